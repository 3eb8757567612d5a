"""How a site is: a file that the process which takes part writes, and anybody on the machine may read."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from fedtune.errors import StoreError
from fedtune.link.client.conditions import PAUSED
from fedtune.link.client.pause import read_pause
from fedtune.link.client.socket_bytes import SocketBytes, SocketMeter
from fedtune.link.settings import JoinSettings, Policy
from fedtune.store import files
from fedtune.store.lock import holder

STATUS = "status.json"
WRITE_S = 300.0
"""After which the bytes of the day are written without an event: a card of flash memory wears off."""
MAX_BYTES = 64 * 1024
"""Of a status file; what is longer is none."""
MAX_CHARS = 500
Connection: TypeAlias = Literal["connecting", "connected", "no connection", "waiting for the server", "complete"]
CONNECTIONS: Mapping[str, Connection] = {
    "hello": "connected",
    "reached": "connected",
    "unreached": "no connection",
    "draining": "waiting for the server",
    "finished": "complete",
    "over": "complete",
}
"""By the event after which it is so."""


@dataclass(frozen=True)
class SiteStatus:
    """What a site has done, and how it is connected."""

    server: str = ""
    connection: Connection = "connecting"
    run: str = ""
    round: int = 0
    """The last one that the site was asked in; 0 before the first."""
    trained: int = 0
    """The last one that it has trained in, and has a receipt of."""
    work: str = ""
    """What that training did, in words: the loss on the site's own rows, and the time."""
    scored: str = ""
    """What the global model scored last on the site's held-out rows."""
    error: str = ""
    """What went wrong last; empty since the last round that went well."""
    waits: str = ""
    """Why the machine may not work now; empty if it may."""
    day: str = ""
    """Local date of the bytes."""
    up_bytes: int | None = None
    """Sent on this day on all connections, TLS and gRPC included; None where the system does not count them."""
    down_bytes: int | None = None
    """Received."""
    written_at: float = 0.0
    """Seconds since 1970."""


def next_status(status: SiteStatus, kind: str, event: Mapping[str, int | str]) -> SiteStatus:
    """Return the status after an event of the client."""
    if kind in CONNECTIONS:
        status = replace(status, connection=CONNECTIONS[kind])
    prefix = f"round {event['round']}: " if event.get("round") else ""
    match kind:
        case "hello":
            return replace(status, server=str(event["server"]), run=str(event["run"]))
        case "asked":
            return replace(status, round=int(event["round"]))
        case "trained":
            return replace(status, trained=int(event["round"]), work=str(event["work"])[:MAX_CHARS], error="")
        case "scored":
            return replace(status, scored=f"{prefix}{event['scores']}"[:MAX_CHARS])
        case "waits":
            return replace(status, waits=str(event["reason"]))
        case "works":
            return replace(status, waits="")
        case "unreached" | "refused" | "failed" | "died" | "put off" | "warning":
            reason = event.get("reason") or event.get("text", "")
            return replace(status, error=f"{prefix}{reason}"[:MAX_CHARS])
        case "declined" if event.get("veto") != "DEVICE_NOT_READY":
            return replace(status, error=f"{prefix}declined, {event['veto']}: {event['reason']}"[:MAX_CHARS])
    return status


class StatusFile:
    """Keeps a site's status in its state folder up to date.

    Events come in any thread, and none waits for the disk: `look` writes, which a thread of the client calls each
    second.
    """

    def __init__(
        self,
        state: Path,
        meter: SocketMeter,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Begin where the process before has ended.

        Args:
            state: folder of the site.
            meter: counts the bytes of its connections.
            clock: seconds from any start.
            now: seconds since 1970.
        """
        self._path, self._meter, self._clock, self._now = state / STATUS, meter, clock, now
        before = load_status(state)
        self._status = replace(before, connection="connecting", waits="", error="")
        self._lock, self._is_news = threading.Lock(), True
        self._counted = SocketBytes()
        self._written_at = float("-inf")

    def record(self, kind: str, **fields: int | str) -> None:
        """Take an event of the client; returns at once."""
        with self._lock:
            status = next_status(self._status, kind, fields)
            self._is_news = self._is_news or status != self._status
            self._status = status

    def look(self) -> None:
        """Count bytes, and write the file if there is news."""
        with self._lock:
            self._count()
            if not self._is_news and self._clock() - self._written_at < WRITE_S:
                return
            self._status = status = replace(self._status, written_at=self._now())
            self._is_news, self._written_at = False, self._clock()
        # On a full disk the site goes on: the file says less than it could, and the next news tries again.
        with suppress(StoreError):
            files.write_bytes(self._path, json.dumps(asdict(status)).encode(), mode=0o600)

    def _count(self) -> None:
        if (total := self._meter.read()) is None:
            return
        moved, self._counted = total - self._counted, total
        today, status = datetime.fromtimestamp(self._now()).date().isoformat(), self._status
        before = status if status.day == today else replace(status, up_bytes=0, down_bytes=0)
        self._status = replace(
            before,
            day=today,
            up_bytes=(before.up_bytes or 0) + moved.up,
            down_bytes=(before.down_bytes or 0) + moved.down,
        )


def load_status(state: Path) -> SiteStatus:
    """Return the status that a state folder holds; one without facts if there is none, or the file is damaged."""
    try:
        with (state / STATUS).open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        value: Any = json.loads(data) if len(data) <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError):
        return SiteStatus()
    if not isinstance(value, dict):
        return SiteStatus()
    # Field by field: a later release may write more, and an earlier one less.
    types: Mapping[str, tuple[type, ...]] = {
        **dict.fromkeys(("round", "trained"), (int,)),
        **dict.fromkeys(("up_bytes", "down_bytes"), (int, type(None))),
        "written_at": (int, float),
    }
    names = [field.name for field in fields(SiteStatus)]
    status = {
        name: value[name] for name in names if isinstance(value.get(name), types.get(name, (str,))) and name in value
    }
    if status.get("connection") not in get_args(Connection):
        status.pop("connection", None)
    return SiteStatus(**status)


@dataclass(frozen=True)
class Standing:
    """A site's status as it is now: with its process, the owner's pause, and when it looks again."""

    status: SiteStatus
    process: str | None
    """Number of the process that takes part; None if there is none."""
    paused_s: float | None
    """For how long its owner has paused it; infinite without an end, None if it is not paused."""
    next_check: str
    """When it looks next whether there is work that it may do, in words."""

    @property
    def facts(self) -> Mapping[str, Any]:
        """The same as values of JSON."""
        paused_s = self.paused_s
        return {
            **asdict(self.status),
            "running": self.process is not None,
            "process": self.process,
            "paused": paused_s is not None,
            "paused_s": None if paused_s is None or math.isinf(paused_s) else round(paused_s),
            "next_check": self.next_check,
        }


def read_standing(state: Path, link: JoinSettings, policy: Policy, *, now: Callable[[], float] = time.time) -> Standing:
    """Return how a site is, from the files of its state folder alone.

    Raises:
        StoreError: if the folder cannot be read.
    """
    paused_s = read_pause(state)
    process = holder(state) if state.is_dir() else None
    status = load_status(state)
    today = datetime.fromtimestamp(now()).date().isoformat()
    if status.day != today and status.up_bytes is not None:
        status = replace(status, day=today, up_bytes=0, down_bytes=0)
    if process is None:
        connection: Connection = "complete" if status.connection == "complete" else "no connection"
        status = replace(status, connection=connection, waits="")
    status = replace(status, waits=PAUSED) if paused_s is not None else status
    return Standing(status, process, paused_s, next_check(status, process, paused_s, link, policy))


def next_check(
    status: SiteStatus, process: str | None, paused_s: float | None, link: JoinSettings, policy: Policy
) -> str:
    """Return in words when a site looks next whether there is work that it may do."""
    if process is None:
        return "when it is started"
    if paused_s is not None:
        return "after resume" if math.isinf(paused_s) else f"in {max(1, round(paused_s / 60))} min"
    if status.waits:
        return "within a second"
    if status.connection == "no connection":
        return f"within {link.backoff_cap_s:g} s"
    hours = f"; work begins within {policy.hours} alone" if policy.hours else ""
    return f"at once, when the server has work{hours}"
