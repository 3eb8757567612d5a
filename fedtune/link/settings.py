"""Settings of the link: addresses, timeouts and quotas of a server, a client's address and pauses, a site's policy."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Le

from fedtune.errors import ConfigError, Fault

KIB, MIB, GIB = 2**10, 2**20, 2**30

ScorePolicy: TypeAlias = Literal["send", "keep", "refuse"]

ENVIRONMENT_PROXY = "environment"
"""As `link.proxy`: what the process's environment says."""
MIN_DIGEST_DIGITS = 8
"""Hex digits of a digest that a policy must give at least: 32 bits, so that no other digest matches by chance."""


@dataclass(frozen=True)
class LinkSettings:
    """How a coordinator listens, and its limits; the table `link` of the server's file."""

    listen: str = "0.0.0.0:9000"
    """Address and port on which clients connect."""
    identity: str = "identity"
    """Folder with the server's keys and certificate, from `fedtune enroll`; relative to the file's folder."""
    hold_s: Annotated[float, Gt(0), Le(300)] = 20.0
    """How long a client's request for work stays open while there is none; shorter than the idle limit of common
    proxies."""
    lease_s: Annotated[float, Gt(0)] = 45.0
    """A client that was silent for longer than this is not asked in the next round."""
    lost_s: Annotated[float, Gt(0)] = 600.0
    """A round stops waiting for a client that was silent, or came no further with its task, for longer than this: no
    step, no second of computation, no byte. A client that only asks comes no further."""
    patience_s: Annotated[float, Gt(0)] = 7 * 24 * 3600.0
    """How long a run waits for enough clients before it stops."""
    stall_s: Annotated[float, Gt(0)] = 60.0
    """A transfer that moves less than `part_kib` within this time is given up; it can go on later from where it
    stopped."""
    drain_s: Annotated[float, Ge(0)] = 30.0
    """How long running transfers may go on when the server shuts down."""
    handshake_s: Annotated[float, Gt(0), Le(120)] = 15.0
    """A new connection must have made its first call within this time; otherwise it is closed. A line of 1 KiB/s needs
    about 8 s."""
    max_source_handshakes: Annotated[int, Ge(1)] = 64
    """Most connections from one address (IPv6: one /64) that have not made a call yet; of more, the oldest are
    closed."""
    part_kib: Annotated[int, Ge(1), Le(512)] = 256
    """Size of one message of a transfer."""
    window_mib: Annotated[int, Ge(1), Le(64)] = 4
    """Most bytes of an upload that are on their way unconfirmed: limits the server's memory, and what is sent again
    after a cut."""
    inline_kib: Annotated[int, Ge(0), Le(512)] = 64
    """Smaller messages travel within the call itself instead of as a transfer."""
    max_concurrent_uploads: Annotated[int, Ge(1)] = 8
    """Most uploads at the same time, one of each client; for a further client the slowest makes room, and goes on later
    from where it stopped."""
    max_concurrent_downloads: Annotated[int, Ge(1)] = 16
    """Most downloads at the same time, up to two of each client; for a further client the slowest makes room, and goes
    on later from where it stopped."""
    calls_per_min: Annotated[int, Ge(10)] = 12_000
    """Most calls of one client in a minute; further ones are refused until the minute is over."""
    day_gib: Annotated[float, Gt(0)] = 100.0
    """Most bytes that one client may send in 24 hours; and as many of what it has fetched before it may fetch again."""
    hello_mib: Annotated[int, Ge(1)] = 1024
    """Largest first message of a client, which brings the initial values of `modules_to_save`."""
    free_mib: Annotated[int, Ge(0)] = 512
    """Disk space that stays free: with less than this, updates are refused until there is more."""
    bar_after: Annotated[int, Ge(1)] = 3
    """A client is blocked after so many final refusals within ten rounds, until the operator deletes its entry in the
    run's `link/barred`."""
    build: str = ""
    """Version of fedtune that every client must run, e.g. "fedtune 0.2.0"; empty allows any."""
    health: str = "127.0.0.1:9464"
    """Address of /healthz, /readyz and /metrics over plain HTTP; empty: none of them."""
    metrics_names: bool = False
    """Show clients by name in the metrics."""


@dataclass(frozen=True)
class EnrolmentSettings:
    """How sites enrol over the network with a one-time code; the table `enrolment` of the server's file."""

    listen: str = ""
    """Address and port of the service, such as "0.0.0.0:9001": another port than the link's. Empty: there is none."""
    address: str = ""
    """What sites dial, as the codes name it; a host of the server's certificate. Empty: the certificate's first host,
    and the port of `listen`."""
    folder: str = "enrolment"
    """Folder of the open invitations and of the queue that goes to the CA; relative to the file's folder."""
    calls_per_min: Annotated[int, Ge(6)] = 60
    """Most calls from one address (IPv6: one /64) in a minute; further ones are refused until the minute is over. A
    site that waits calls six times a minute."""


@dataclass(frozen=True)
class JoinSettings:
    """How a site reaches the server; the table `link` of a site's file."""

    address: str
    """Host and port of the server."""
    identity: str = "identity"
    """Folder with the site's keys and certificate, from `fedtune enroll`; relative to the file's folder."""
    state: str = "state"
    """Folder of the outbox, the audit log and what each run sent and received; relative to the file's folder."""
    server_name: str = ""
    """Name in the server's certificate, if it is not the host in `address`."""
    # Not in the repr: a password may be in it, and what shows settings must not show that.
    proxy: str = field(default="", repr=False)
    """HTTP proxy through which the site connects, by CONNECT, e.g. "http://proxy.example.org:3128", or with a password
    (Basic) "http://USER:PASSWORD@proxy.example.org:3128"; "environment": that of HTTPS_PROXY, but for the hosts of
    NO_PROXY; empty: straight, whatever the environment says."""
    proxy_credentials: str = ""
    """File with one line USER:PASSWORD for the proxy, which its owner alone may read, so that they need not stand here;
    relative to the file's folder."""
    backoff_s: Annotated[float, Gt(0)] = 0.5
    """Pause after the first failed connection. Each further pause may be twice as long, up to `backoff_cap_s`; the
    actual one is drawn at random below that."""
    backoff_cap_s: Annotated[float, Gt(0)] = 30.0
    """Seconds of the longest pause between two attempts to connect."""
    patience_s: Annotated[float, Ge(0)] = 0.0
    """The site gives up after this time without a connection; 0: never."""
    max_up_kib_s: Annotated[float, Gt(0)] | None = None
    """Bandwidth that the site's answers take at most; none: no limit. Signs of life go on beside them. At least what
    the server asks of a transfer: its `link.part_kib` in three quarters of `link.stall_s`, by default 5.7."""
    max_down_kib_s: Annotated[float, Gt(0)] | None = None
    """Bandwidth that the orders of the server take at most; none: no limit. At least as much as for `max_up_kib_s`."""


@dataclass(frozen=True)
class Policy:
    """What the site allows a run to do; the table `policy` of its file. What is not mentioned is allowed."""

    methods: Sequence[str] = ()
    """Methods that may be run; empty: any that is installed."""
    recipes: Sequence[str] = ()
    """Recipes that may be run, by their SHA-256 or at least its first 8 hexadecimal digits; empty: any."""
    bases: Sequence[str] = ()
    """Base models that may be tuned, by their SHA-256 or at least its first 8 hexadecimal digits; empty: the one that
    the site loads."""
    max_rank: Annotated[int, Ge(1)] | None = None
    """Largest LoRA rank that the site trains; none: any."""
    max_steps: Annotated[int, Ge(1)] | None = None
    """Most optimizer steps of a round, or directions with `fedkseed`; none: any number."""
    max_rounds: Annotated[int, Ge(1)] | None = None
    """Rounds of one run in which the site takes part; none: all."""
    max_up_mib: Annotated[float, Gt(0)] | None = None
    """Most that leaves the site in one answer; none: no limit."""
    max_down_mib: Annotated[float, Gt(0)] | None = None
    """Most that the site fetches for one assignment; none: no limit."""
    day_up_mib: Annotated[float, Gt(0)] | None = None
    """Most that leaves the site within 24 hours; none: no limit."""
    hours: str = ""
    """Hours in which the site begins work, in its local time, e.g. "20:00-06:00"; empty: always."""
    min_cohort: Annotated[int, Ge(1)] = 1
    """The site takes part only in rounds of at least so many organisations, its own among them, by the names in the
    order and this site's own roster. In a round of two, each can compute the other's update from the result."""
    min_examples: Annotated[int, Ge(1)] = 32
    """Distinct training examples that an update must be of; a smaller one can be turned back into their texts. A site
    that holds fewer, or trains fewer in a round, takes part only if it sets this lower."""
    min_steps: Annotated[int, Ge(1)] = 1
    """Fewest optimizer steps of a round, or directions with `fedkseed`, after which an update leaves the site."""
    allow_embeddings: bool = False
    """Let layers with a row for each token be trained: embeddings, and the output layer of a causal model. The rows
    that move say which tokens this site's texts hold."""
    max_memory_gib: Annotated[float, Gt(0)] | None = None
    """Most main memory of the training process; with more it is ended, and the order declined. none: no limit."""
    power: Literal["any", "mains"] = "any"
    """mains: the site works only while its machine is on mains power, or above `min_battery`. Where the machine does
    not tell, a site with `mains` does not start."""
    min_battery: Annotated[float, Ge(1), Le(100)] | None = None
    """Charge of the battery above which the site works without mains power, too; below it, only on mains power. none:
    with `power` at `any` the battery does not count."""
    max_temperature_c: Annotated[float, Ge(20), Le(120)] | None = None
    """Temperature of the hottest part that the machine tells of, above which the site waits until it is 3 °C below.
    none: no limit."""
    min_free_mib: Annotated[int, Ge(0)] = 512
    """Disk space that stays free, whatever an order brings: other programs of the machine may need it."""
    columns: Sequence[str] = ()
    """Columns of the site's files that may become training text; empty: those that the table `data` names."""
    labels: Literal["send", "keep"] = "send"
    """Classification: whether the names of the classes that occur in the site's data leave it. keep: `data.labels` of
    this file must name the classes that the federation has agreed on, and only these are sent."""
    scores: ScorePolicy = "send"
    """What the site does when it is asked what a global model scores on its held-out rows: send the scores, which are
    means over the rows; keep them in its own log; or refuse to score. The losses before and after its training leave
    with send alone; planners that learn from them learn nothing of the site otherwise."""
    energy: Literal["keep", "send"] = "keep"
    """Joules that the machine took for a round, where its kernel tells (RAPL, or a battery that is drained). keep: in
    the site's own log alone; send: with each update, for the records of the run."""
    unsigned_base: bool = False
    """A device of `fedtune-edge`: take a bundle that no coordinator of the federation has signed, with a warning. Its
    files are then checked for damage alone."""
    ask: bool = False
    """Wait until a person at the terminal has agreed to the recipe, once per run."""


def validate_policy(policy: Policy) -> None:
    """Check the texts of a policy, whose form no type describes.

    Raises:
        ConfigError: with every fault.
    """
    faults = []
    if policy.hours and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d", policy.hours):
        faults.append(Fault("policy.hours", 'two times of day, such as "20:00-06:00"', repr(policy.hours)))
    for name in ("recipes", "bases"):
        faults += [
            Fault(f"policy.{name}", "at least 8 hexadecimal digits each", repr(digest))
            for digest in getattr(policy, name)
            if not re.fullmatch(r"[0-9a-fA-F]{8,64}", digest)
        ]
    if faults:
        raise ConfigError(faults)
