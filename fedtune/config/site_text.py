"""A site's own file as text, commented, for those who are asked what belongs in it instead of writing it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

STATE = "state"
DEVICE_HEAD = """\
# This device's own file; `fedtune-edge inspect` shows what it means for your data.
# Everything that may stand here: the reference page "site" of the documentation.
"""
DEVICE_POLICY = """
[policy]
# What you allow; take the # away from a line to set a limit.
# power = "mains"           # work only while plugged in
# min_battery = 60          # or above this charge, in percent
# max_temperature_c = 70
# hours = "22:00-07:00"     # begin work only within these hours
# max_memory_gib = 1.0
# ask = true                # wait for your yes before each run
"""
SITE_HEAD = """\
# One site of a federation: what it trains on, whom it dials, and what it allows. It never leaves this machine.
# Relative paths start at this file's folder; "fedtune schema site" and the reference page "site" have every key.
"""
PORT = 9000
COMMENT_AT = 40
"""Column at which comments behind a value begin, where the value leaves room."""


@dataclass(frozen=True)
class SiteAnswers:
    """What a site's file is made of."""

    name: str
    address: str
    identity: str
    base: str
    source: str
    targets: Sequence[str] = ("all-linear",)
    proxy: str = field(default="", repr=False)
    proxy_credentials: str = ""
    task: str = "causal"
    fields: Mapping[str, str] = field(default_factory=dict)
    """Columns of the data by the part that they play; empty where that is not known yet."""
    max_rounds: int | None = None
    hours: str = ""
    max_memory_gib: float | None = None
    ask: bool = False
    scores: str = "send"


def toml_string(text: str) -> str:
    r"""Return a text as a string of TOML.

    >>> toml_string('a "b"')
    '"a \\"b\\""'
    """
    # TOML's strings escape as those of JSON do, and DEL as well.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def with_port(address: str) -> str:
    """Return an address with its port.

    >>> with_port("fl.example.org"), with_port("10.0.0.2:9443"), with_port("")
    ('fl.example.org:9000', '10.0.0.2:9443', '')
    """
    host, colon, port = address.rpartition(":")
    return address if not address or (colon and host and port.isdecimal()) else f"{address}:{PORT}"


def device_text(name: str, *, address: str, model: str, data: str, identity: str) -> str:
    """Return the file of a device of `fedtune-edge`, with defaults that work."""
    return (
        f"{DEVICE_HEAD}name = {toml_string(name)}\n\n[model]\nbase = {toml_string(model)}    # folder of the bundle\n\n"
        f"[data]\nsource = {toml_string(data)}    # a file or folder of text, JSON lines or CSV\n\n"
        f"[link]\naddress = {toml_string(address)}\nidentity = {toml_string(identity)}\n"
        f"state = {toml_string(STATE)}\n{DEVICE_POLICY}"
    )


def site_text(answers: SiteAnswers) -> str:
    """Return the file of a site with torch."""
    parts = [(SITE_HEAD.splitlines(), general_lines), ([], link_lines), ([], policy_lines), ([], data_lines)]
    return "\n".join("\n".join([*head, *lines(answers)]) for head, lines in parts) + "\n"


def line(key: str, value: str, comment: str = "", *, off: bool = False) -> str:
    """Return a key with its value and a comment; one that is off is a comment as a whole."""
    setting = f"{'# ' if off else ''}{key} = {value}"
    return f"{setting:{COMMENT_AT}} # {comment}" if comment else setting


def general_lines(answers: SiteAnswers) -> Iterator[str]:
    yield line("name", toml_string(answers.name), "as this site is enrolled")
    yield line("seed", "0", "the run's; a new classification head starts from it")
    yield ""


def link_lines(answers: SiteAnswers) -> Iterator[str]:
    yield "[link]"
    yield line("address", toml_string(answers.address), "the coordinator; a name in its certificate")
    yield line("identity", toml_string(answers.identity), "made by fedtune enroll; its keys stay there")
    yield line("state", toml_string(STATE), "outbox and audit log; must outlive a restart")
    proxy = "HTTP proxy on the way; environment: that of HTTPS_PROXY"
    yield line("proxy", toml_string(answers.proxy or "http://proxy.example.org:3128"), proxy, off=not answers.proxy)
    secret = toml_string(answers.proxy_credentials or "proxy.secret")
    yield line("proxy_credentials", secret, "file of mode 600: USER:PASSWORD", off=not answers.proxy_credentials)
    yield ""


def policy_lines(answers: SiteAnswers) -> Iterator[str]:
    rounds, memory = answers.max_rounds, answers.max_memory_gib
    yield "[policy]" + " " * (COMMENT_AT - 8) + " # this site's word is final; what is not mentioned is allowed"
    yield line("max_rounds", str(rounds or 50), "rounds of one run, at most", off=rounds is None)
    yield line(
        "hours", toml_string(answers.hours or "20:00-06:00"), "when work may begin, local time", off=not answers.hours
    )
    number = f"{memory or 16:g}"
    yield line("max_memory_gib", number, "of the training process, which is ended above it", off=memory is None)
    yield line("ask", str(answers.ask).lower(), "true: a person at the terminal must agree to each run first")
    yield line("scores", toml_string(answers.scores), "of the global model on held-out rows: send, keep, refuse")
    if answers.fields:
        columns = ", ".join(map(toml_string, dict.fromkeys(answers.fields.values())))
        yield line("columns", f"[{columns}]", "that may become training text; no other is read")
    yield line("min_examples", "32", "distinct examples that an update must be of", off=True)
    yield line("max_rank", "32", "largest LoRA rank that is trained", off=True)
    yield line("day_up_mib", "1024", "most that leaves in 24 hours", off=True)
    yield ""


def data_lines(answers: SiteAnswers) -> Iterator[str]:
    yield "[model]" + " " * (COMMENT_AT - 7) + " # the same weights at every site"
    yield line("base", toml_string(answers.base), "folder with config.json, tokenizer, safetensors; or hub name")
    if answers.task != "causal":
        yield line("task", toml_string(answers.task))
    yield ""
    yield "[adapter]" + " " * (COMMENT_AT - 9) + " # the same at every site, as in the run's recipe"
    yield line("targets", f"[{', '.join(map(toml_string, answers.targets))}]", "layers that get an adapter")
    yield ""
    yield "[data]" + " " * (COMMENT_AT - 6) + " # all of it is this site's own"
    yield line("source", toml_string(answers.source))
    fields = ", ".join(f"{part} = {toml_string(column)}" for part, column in answers.fields.items())
    if fields:
        yield line("fields", f"{{ {fields} }}")
    else:
        yield line("fields", '{ instruction = "question", output = "answer" }', "which column is what", off=True)
    yield line("held_out", "0.1", "share of the rows that is never trained on")
