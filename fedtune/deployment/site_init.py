"""What a site's file is made of, question by question: defaults from its folder, and every answer checked."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from fedtune.config.site import bind_site_text
from fedtune.config.site_text import SiteAnswers, site_text, with_port
from fedtune.data.files import ENDINGS, format_of
from fedtune.data.rows import choose
from fedtune.data.settings import DataSettings, Part, Split, Task
from fedtune.data.source import read_original
from fedtune.errors import ConfigError, ExtraError, Fault
from fedtune.link.client.http_proxy import parse_proxy
from fedtune.link.pki.certificates import spiffe_parts
from fedtune.link.pki.identity import CERTIFICATE
from fedtune.link.pki.roster import NAME
from fedtune.link.settings import ENVIRONMENT_PROXY, Policy, ScorePolicy, validate_policy
from fedtune.store.files import write_bytes

SECRET = "proxy.secret"
"""File beside a site's own with user and password of its proxy."""
WHOLE = Split("iid", clients=1)
USUAL: Mapping[str, Sequence[str]] = {
    "instruction": ("question", "query", "problem", "user"),
    "input": ("context", "passage"),
    "output": ("answer", "response", "solution", "summary", "target", "assistant"),
    "text": ("sentence", "content", "body", "document"),
    "label": ("class", "category", "target"),
}
"""Names of columns that data sets often have for a part, beside those that are taken without being asked."""
Answers = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """What is known of a site's rows."""

    source: str
    count: int = 0
    names: Sequence[str] = ()
    """Of the columns; empty of rows that are not there yet."""
    note: str = ""
    """Why nothing is known of them."""


@dataclass(frozen=True)
class Question:
    """One thing to know."""

    key: str
    """Also its option on the command line."""
    why: str
    """What it is for, in a line."""
    default: Callable[[Answers], str]
    """Of the answers so far; empty: nothing, where that is an answer."""
    read: Callable[[str, Answers], Any]
    """Returns the answer in a text; raises ConfigError where it is none."""
    needs: str = ""
    """What an answer is, of a question that has one; empty where nothing is an answer, too."""
    needed: Callable[[Answers], bool] = lambda answers: True


def questions(path: Path, environment: Mapping[str, str]) -> Sequence[Question]:
    """Return what is asked for a site's file, in order.

    Args:
        path: of the file.
        environment: of the process, for its proxy.
    """
    root = path.absolute().parent
    proxied = environment.get("https_proxy") or environment.get("HTTPS_PROXY")

    def at(text: str, answers: Answers) -> str:
        return existing(text, root)

    return (
        Question("identity", "Folder with this site's keys, made by fedtune enroll.", lambda known: "identity", at),
        Question(
            "name",
            "Name under which this site is enrolled.",
            lambda known: enrolled_name(root / known["identity"]) or proposed_name(),
            lambda text, known: read_name(text, enrolled_name(root / known["identity"])),
        ),
        Question(
            "server",
            "Address of the coordinator, HOST or HOST:PORT.",
            lambda known: "",
            read_server,
            "HOST or HOST:PORT",
        ),
        Question(
            "proxy",
            "HTTP proxy on the way: http://HOST:PORT, environment (HTTPS_PROXY), or none.",
            lambda known: ENVIRONMENT_PROXY if proxied else "none",
            read_proxy,
        ),
        Question("base", "The base model: a folder, or its name on a model hub.", lambda known: "base", at),
        Question(
            "targets",
            "Layers that get an adapter, as in the run's recipe, with commas.",
            lambda known: "all-linear",
            lambda text, known: read_list("targets", text),
        ),
        Question(
            "data",
            "This site's rows: a file or folder of JSON lines, CSV or Parquet.",
            lambda known: rows_in(root),
            lambda text, known: read_rows(existing(text, root), root),
            "a file or folder",
        ),
        Question(
            "task",
            "causal: the model writes text; classification: it gives each row a label.",
            lambda known: "causal",
            lambda text, known: read_choice("task", text, get_args(Task)),
            needed=lambda known: "label" in known["data"].names,
        ),
        Question(
            "fields",
            "What the columns are for: instruction=question,output=answer; empty: later.",
            lambda known: usual_fields(known),
            read_fields,
            needed=lambda known: bool(known["data"].names) and not columns_by_name(known)[0],
        ),
        Question(
            "max-rounds",
            "Rounds of one run in which this site takes part, at most; all: no limit.",
            lambda known: "50",
            lambda text, known: None if text == "all" else read_number("max-rounds", text, int),
        ),
        Question(
            "hours",
            "Hours in which work may begin, such as 20:00-06:00; always: no limit.",
            lambda known: "always",
            read_hours,
        ),
        Question(
            "max-memory-gib",
            "GiB of main memory that training may take, else it is ended; all: no limit.",
            lambda known: "all",
            lambda text, known: None if text == "all" else read_number("max-memory-gib", text, float),
        ),
        Question(
            "ask",
            "yes: a person at the terminal must agree before this site takes part in a run.",
            lambda known: "no",
            lambda text, known: read_choice("ask", text, ("yes", "no")) == "yes",
        ),
        Question(
            "scores",
            "Scores of the global model on held-out rows: send, keep (here), or refuse.",
            lambda known: "send",
            lambda text, known: read_choice("scores", text, get_args(ScorePolicy)),
        ),
    )


def write(path: Path, answers: Answers) -> Sequence[str]:
    """Write a site's file, after it has been bound, and the file with its proxy's password; return what was written.

    Raises:
        ConfigError: if the answers do not make a file that binds, or there is one already.
        StoreError: if it cannot be written.
    """
    proxy, secret = without_password(answers["proxy"])
    made_of = SiteAnswers(
        name=answers["name"],
        address=answers["server"],
        identity=answers["identity"],
        base=answers["base"],
        source=answers["data"].source,
        targets=answers["targets"],
        proxy=proxy,
        proxy_credentials=SECRET if secret else "",
        task=answers.get("task", "causal"),
        fields=answers.get("fields") or columns_by_name(answers)[0],
        max_rounds=answers["max-rounds"],
        hours=answers["hours"],
        max_memory_gib=answers["max-memory-gib"],
        ask=answers["ask"],
        scores=answers["scores"],
    )
    text = site_text(made_of)
    bind_site_text(text, path)
    check_free(path)
    if secret:
        check_free(path.parent / SECRET)
        write_bytes(path.parent / SECRET, f"{secret}\n".encode(), mode=0o600)
    write_bytes(path, text.encode())
    return [str(path), *([str(path.parent / SECRET)] if secret else [])]


def next_steps(path: Path, answers: Answers) -> Iterator[str]:
    """Yield what to do next, in order."""
    root = path.absolute().parent
    if not enrolled_name(root / answers["identity"]):
        yield f"next: fedtune enroll request --name {answers['name']} --org YOURS --identity {answers['identity']}"
    if not (root / answers["base"]).exists() and answers["base"].count("/") != 1 and answers["base"] != "embedded":
        yield f"still missing: the base in {root / answers['base']}"
    if not answers["data"].names:
        yield f"still missing: rows in {root / answers['data'].source}"
    elif not (answers.get("fields") or columns_by_name(answers)[0]):
        yield "still missing: data.fields, which says what the columns are for"
    yield f"next: fedtune site check {path}"
    yield f"then: fedtune join {path} --dry-run"


def check_free(path: Path) -> None:
    """Refuse to write over a file.

    Raises:
        ConfigError: if there is one.
    """
    if path.exists() or path.is_symlink():
        raise ConfigError(Fault("", f"no file {path}", "one that is there", "name another, or move it away first"))


def without_password(proxy: str) -> tuple[str, str]:
    """Return a proxy's URL without user and password, and those as USER:PASSWORD."""
    if proxy in ("", ENVIRONMENT_PROXY):
        return proxy, ""
    parsed = parse_proxy(proxy, key="proxy")
    return parsed.label, f"{parsed.user}:{parsed.password}" if parsed.user else ""


def enrolled_name(identity: Path) -> str:
    """Return the name in the certificate of an identity; empty without one that can be read."""
    try:
        return spiffe_parts((identity / CERTIFICATE).read_bytes())[2]
    except (OSError, ValueError):
        return ""


def proposed_name() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname().partition(".")[0]).strip("-")[:40] or "site-a"


def rows_in(root: Path) -> str:
    """Return the only file of rows in a folder; empty if there is none, or more than one."""
    files = [each.name for each in sorted(root.glob("*")) if each.is_file() and format_of(each) in {*ENDINGS.values()}]
    rows = [name for name in files if not name.endswith((".json", ".txt"))]  # requests and notes lie there, too
    return rows[0] if len(rows) == 1 else ""


def existing(text: str, root: Path) -> str:
    """Return a path as a file in `root` names it: one that is there only for this command is written out in full."""
    if not text.strip():
        raise ConfigError(Fault("", "a path or a name", "nothing"))
    here = Path(text.strip()).expanduser()
    return str(here.absolute()) if here.exists() and not (root / here).exists() else text.strip()


def read_rows(source: str, root: Path) -> Rows:
    """Return what can be seen of the rows of a source; of those that are not there yet, why there is nothing."""
    path = root / source
    if not path.exists() and not any(mark in source for mark in "*?["):
        return Rows(source, note=f"{source}: nothing there yet; its columns are read when the site joins")
    try:
        table = read_original(DataSettings(source, WHOLE), root, source, key="data")
    except (ConfigError, ExtraError) as error:
        return Rows(source, note=str(error))
    return Rows(source, table.count, table.names)


def columns_by_name(answers: Answers, fields: Mapping[Part, str] | None = None) -> tuple[Mapping[str, str], str]:
    """Return which column plays which part by its name, or as `fields` say; none, and why, where none make up a row."""
    rows = answers["data"]
    settings = DataSettings(rows.source, WHOLE, fields=fields or {})
    try:
        chosen = choose(settings, rows.names, rows.source, answers.get("task", "causal"))
    except ConfigError as error:
        return {}, str(error)
    return {str(part): column for part, column in chosen.columns.items()}, chosen.note


def usual_fields(answers: Answers) -> str:
    """Return fields that fit the names of the columns, as an answer; empty if none make up a row."""
    names: Sequence[str] = answers["data"].names
    fields: dict[Any, str] = {}
    for part, others in USUAL.items():
        column = next((name for name in names if name.lower() in (part, *others) and name not in fields.values()), None)
        if column is not None:
            fields[part] = column
    for chosen in (fields, {part: column for part, column in fields.items() if part in ("text", "label")}):
        if columns := columns_by_name(answers, chosen)[0]:
            return ",".join(f"{part}={column}" for part, column in columns.items())
    return ""


def remarks(answers: Answers) -> Iterator[str]:
    """Yield what to say of the rows once they are known."""
    rows = answers["data"]
    if not rows.names:
        yield rows.note
        return
    yield f"{rows.source}: {rows.count:,} rows; columns {', '.join(rows.names)}"
    columns, note = columns_by_name(answers)
    if columns:
        yield "used: " + ", ".join(f"{part} from {column!r}" for part, column in columns.items())
        if note:
            yield note
    else:
        yield "which column is the instruction, the output or the text is not clear from these names"
    if rows.count * 0.9 < (least := Policy.min_examples):
        yield f"fewer than {least} rows to train on: this site takes part only with a lower policy.min_examples"


def read_name(text: str, enrolled: str) -> str:
    if not NAME.fullmatch(text):
        raise ConfigError(Fault("name", "letters, digits, '.', '_' and '-', a letter or digit first", repr(text)))
    if enrolled and text != enrolled:
        raise ConfigError(Fault("name", f"{enrolled!r}, as this site is enrolled", repr(text)))
    return text


def read_server(text: str, answers: Answers) -> str:
    address = with_port(text.strip())
    host, _, port = address.rpartition(":")
    if not re.fullmatch(r"[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]", host) or not 0 < int(port) < 65536:
        raise ConfigError(Fault("server", "HOST or HOST:PORT", repr(text), "ask the coordinator"))
    return address


def read_proxy(text: str, answers: Answers) -> str:
    text = "" if text.strip() == "none" else text.strip()
    if text not in ("", ENVIRONMENT_PROXY):
        parse_proxy(text, key="proxy")
    return text


def read_list(key: str, text: str) -> Sequence[str]:
    items = [item.strip() for item in text.split(",") if item.strip()]
    if not items:
        raise ConfigError(Fault(key, "at least one name", "none"))
    return items


def read_choice(key: str, text: str, choices: Sequence[str]) -> str:
    if text.strip().lower() not in choices:
        raise ConfigError(Fault(key, " or ".join(choices), repr(text)))
    return text.strip().lower()


def read_number(key: str, text: str, kind: type[int] | type[float]) -> float:
    try:
        number = kind(text)
    except ValueError:
        number = kind(0)
    if not 0 < number < 10**6:
        raise ConfigError(Fault(key, f"a number above 0{', whole' if kind is int else ''}, or all", repr(text)))
    return number


def read_hours(text: str, answers: Answers) -> str:
    hours = "" if text.strip() in ("always", "") else text.strip()
    validate_policy(replace(Policy(), hours=hours))
    return hours


def read_fields(text: str, answers: Answers) -> Mapping[str, str]:
    """Return which column plays which part, checked against the columns that there are."""
    if not text.strip():
        return {}
    pairs = [pair.partition("=") for pair in read_list("fields", text)]
    fields: dict[Any, str] = {part.strip(): column.strip() for part, _, column in pairs}
    if wrong := [part for part in fields if part not in get_args(Part)]:
        expected = f"PART=COLUMN, with a part of {', '.join(get_args(Part))}"
        raise ConfigError(Fault("fields", expected, repr(wrong[0])))
    columns, why = columns_by_name(answers, fields)
    if answers["data"].names and not columns:
        raise ConfigError(Fault("", "", why))
    return columns or fields
