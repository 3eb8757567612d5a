"""How a coordinator listens and how a client dials: limits, patience and quotas of the link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le

KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclass(frozen=True)
class LinkSettings:
    """The table `link` of a server's own file; nothing in it changes what a run computes."""

    listen: str = "0.0.0.0:9000"
    """Address and port; clients dial it."""
    identity: str = "identity"
    """Folder made by `fedtune enroll`; relative to the file's folder."""
    hold_s: Annotated[float, Gt(0), Le(300)] = 20.0
    """How long a client's question for work is held; below the idle limits of common proxies."""
    lease_s: Annotated[float, Gt(0)] = 45.0
    """Without a sign of life, after which a client is not offered to the next round."""
    lost_s: Annotated[float, Gt(0)] = 600.0
    """Without a sign of life, after which a round waits no longer for a client that works for it."""
    patience_s: Annotated[float, Gt(0)] = 7 * 24 * 3600.0
    """How long a run waits for enough clients."""
    stall_s: Annotated[float, Gt(0)] = 60.0
    """Without a byte, after which a transfer is given up; where it stood is kept."""
    drain_s: Annotated[float, Ge(0)] = 30.0
    """That transfers are given to end when the server goes down."""
    part_kib: Annotated[int, Ge(1), Le(512)] = 256
    """KiB per message of a transfer."""
    window_mib: Annotated[int, Ge(1), Le(64)] = 4
    """MiB of an upload that may be under way: bounds the memory of the server and what a cut sends again."""
    inline_kib: Annotated[int, Ge(0), Le(512)] = 64
    """KiB up to which a part travels within the call itself."""
    uploads: Annotated[int, Ge(1)] = 8
    """At once."""
    downloads: Annotated[int, Ge(1)] = 16
    """At once."""
    calls_per_min: Annotated[int, Ge(10)] = 12_000
    """Of one client."""
    day_gib: Annotated[float, Gt(0)] = 100.0
    """GiB that one client may send in 24 hours."""
    hello_mib: Annotated[int, Ge(1)] = 1024
    """MiB of a client's hello, which brings the initial values of `modules_to_save`."""
    free_mib: Annotated[int, Ge(0)] = 512
    """MiB that stay free on the disk; below that no update is taken for the time being."""
    bar_after: Annotated[int, Ge(1)] = 3
    """Final refusals in ten rounds after which a client is barred until the operator clears it."""
    build: str = ""
    """Version of fedtune that every client must run, e.g. "fedtune 0.2.0"; empty for any."""
    health: str = "127.0.0.1:9464"
    """Address of /healthz, /readyz and /metrics, plain HTTP; empty for none."""
    metrics_names: bool = False
    """Whether client names appear in the metrics."""


@dataclass(frozen=True)
class JoinSettings:
    """The table `link` of a site's own file."""

    address: str
    """Host and port of the server."""
    identity: str = "identity"
    """Folder made by `fedtune enroll`; relative to the file's folder."""
    state: str = "state"
    """Folder of the outbox and the audit log; relative to the file's folder."""
    server_name: str = ""
    """Name in the server's certificate, where it is not the host of the address."""
    proxy: str = ""
    """HTTP proxy that connections are tunnelled through, e.g. "http://proxy.example.org:3128"."""
    backoff_s: Annotated[float, Gt(0)] = 0.5
    """First pause after a failed connection; doubled up to `backoff_cap_s`, and drawn at random below that."""
    backoff_cap_s: Annotated[float, Gt(0)] = 30.0
    """Longest pause between two attempts to connect."""
    patience_s: Annotated[float, Ge(0)] = 0.0
    """Without a connection, after which the client gives up; 0: never."""
