"""Settings of the link: addresses, timeouts and quotas of a server, address and pauses of a client."""

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
    """Seconds for which a client's call for work is held; below the idle limits of common proxies."""
    lease_s: Annotated[float, Gt(0)] = 45.0
    """Seconds without a sign of life, after which a client is not sampled for the next round."""
    lost_s: Annotated[float, Gt(0)] = 600.0
    """Seconds without a sign of life, after which a round does not wait any longer for a client that works for it."""
    patience_s: Annotated[float, Gt(0)] = 7 * 24 * 3600.0
    """Seconds for which a run waits for enough clients."""
    stall_s: Annotated[float, Gt(0)] = 60.0
    """Seconds without a byte, after which a transfer is given up; the next one goes on behind what came."""
    drain_s: Annotated[float, Ge(0)] = 30.0
    """Seconds within which transfers can end when the server goes down."""
    part_kib: Annotated[int, Ge(1), Le(512)] = 256
    """KiB per message of a transfer."""
    window_mib: Annotated[int, Ge(1), Le(64)] = 4
    """MiB of an upload without an acknowledgement: bounds the server's memory, and what is sent again after a cut."""
    inline_kib: Annotated[int, Ge(0), Le(512)] = 64
    """KiB up to which a part travels within the call itself."""
    max_concurrent_uploads: Annotated[int, Ge(1)] = 8
    """Uploads at the same time, of all clients; a further one is tried again later."""
    max_concurrent_downloads: Annotated[int, Ge(1)] = 16
    """Downloads at the same time, of all clients; a further one is tried again later."""
    calls_per_min: Annotated[int, Ge(10)] = 12_000
    """Calls of one client in a minute, beyond which further ones are refused for now."""
    day_gib: Annotated[float, Gt(0)] = 100.0
    """GiB that one client may send in 24 hours."""
    hello_mib: Annotated[int, Ge(1)] = 1024
    """MiB of a client's profile, which brings the initial values of `modules_to_save`."""
    free_mib: Annotated[int, Ge(0)] = 512
    """MiB that stay free on the disk; below that, updates are refused for now."""
    bar_after: Annotated[int, Ge(1)] = 3
    """Final refusals in ten rounds, after which a client is blocked until the operator admits it again."""
    build: str = ""
    """Version of fedtune that every client must run, e.g. "fedtune 0.2.0"; empty: any."""
    health: str = "127.0.0.1:9464"
    """Address of /healthz, /readyz and /metrics, plain HTTP; empty: none."""
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
    """Seconds of the first pause after a failed connection; doubled up to `backoff_cap_s`, then drawn below that."""
    backoff_cap_s: Annotated[float, Gt(0)] = 30.0
    """Seconds of the longest pause between two attempts to connect."""
    patience_s: Annotated[float, Ge(0)] = 0.0
    """Seconds without a connection, after which the client gives up; 0: never."""
