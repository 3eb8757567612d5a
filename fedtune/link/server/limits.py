"""What a client may have under way, and how much of it must move: per client and by progress, never by who came first.

Nothing here waits or touches a socket: the service says when a call begins, gains bytes and ends, and asks `look` a few
times a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from fedtune.link.rejections import RejectionError, rejection
from fedtune.link.settings import KIB, LinkSettings
from fedtune.wire.v1 import link_pb2 as pb

Kind: TypeAlias = Literal["held", "upload", "download"]
MOST: Mapping[Kind, int] = {"held": 4, "upload": 1, "download": 2}
"""Calls of a kind that one client may have under way."""
TURN_S = 10.0
"""A transfer keeps its place for so long; then the slowest one makes room for a client that has none."""
END_S = 1.0
"""Given to a call to end by itself."""
HELLOS_PER_MIN = 60
"""Of one client: each reply carries the recipe, and may carry the roster."""
REFUSALS_PER_MIN = 30
"""Final refusals of one client; after them its calls are not looked at until the minute is over."""
MINUTE_S = 60.0
MAX_NAMES = 4096
"""Clients that are counted by name: a CA names its parties, but nothing here should grow without a bound."""


def check_nothing() -> None:
    """Find nothing wrong."""


@dataclass(eq=False)
class OpenCall:
    """A call that lasts: held until there is news, or a transfer."""

    client: str
    kind: Kind
    interrupt: Callable[[], object]
    """Makes the call look at `error`."""
    abandon: Callable[[], object]
    """Ends the call from outside, when it has not ended by itself."""
    began: float
    check: Callable[[], object] = check_nothing
    """Raises a RejectionError when the call must not go on."""
    num_bytes: int = 0
    """That a transfer has moved."""
    left_bytes: int | None = None
    """That it still has to move; None if that is not known yet."""
    error: RejectionError | None = None
    """Why it must end; None if it may go on."""
    reading: bool = False
    """Whether it waits for its client's next message, and for nothing else."""
    displaced: bool = False
    """Whether a newer call of its client took the place."""
    ends_at: float | None = field(init=False, default=None)
    """When it is abandoned; None as long as it may go on."""
    looked_at: float = field(init=False)
    looked_bytes: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.looked_at = self.began

    def move(self, num_bytes: int) -> None:
        """Note that so many more bytes have moved."""
        self.num_bytes += num_bytes
        if self.left_bytes is not None:
            self.left_bytes -= num_bytes

    @property
    def ending(self) -> bool:
        return self.error is not None or self.displaced

    def end(self, error: RejectionError | None) -> None:
        """Have the call end: with an error, or in favour of a newer one."""
        if not self.ending:
            self.error, self.displaced = error, error is None
            self.interrupt()

    def rate(self, now: float) -> float:
        """Return bytes per second since its begin."""
        return self.num_bytes / max(now - self.began, 1e-9)


class OpenCalls:
    """The calls that are under way; not thread-safe, the service's loop alone calls it."""

    def __init__(self, settings: LinkSettings, clock: Callable[[], float]) -> None:
        self._settings, self._clock = settings, clock
        self._part_bytes = settings.part_kib * KIB
        self._total: Mapping[Kind, int] = {
            "upload": settings.max_concurrent_uploads,
            "download": settings.max_concurrent_downloads,
        }
        self._calls: list[OpenCall] = []

    @property
    def transfers(self) -> int:
        return sum(call.kind != "held" for call in self._calls)

    def begin(
        self,
        client: str,
        kind: Kind,
        *,
        interrupt: Callable[[], object],
        abandon: Callable[[], object] = check_nothing,
        check: Callable[[], object] = check_nothing,
    ) -> OpenCall:
        """Begin a call; the functions are those of `OpenCall`.

        Of held calls the newest displaces the oldest of its client: those on a connection that broke off unnoticed must
        not keep the client out of the next one.

        Raises:
            RejectionError: if the client has as many transfers of this kind as it may, or no place is free for one.
        """
        own = [call for call in self._calls if call.client == client and call.kind == kind]
        if len(own) >= MOST[kind]:
            if kind != "held":
                raise rejection(pb.BUSY, f"{kind}s", f"at most {MOST[kind]} of one client at once", "one more")
            oldest = min((call for call in own if not call.ending), key=lambda call: call.began, default=None)
            if oldest is not None:
                oldest.end(None)
        if kind != "held":
            self._make_room(client, kind)
        call = OpenCall(client, kind, interrupt, abandon, self._clock(), check)
        self._calls.append(call)
        return call

    def finish(self, call: OpenCall) -> None:
        """Note that a call has ended."""
        self._calls.remove(call)

    def look(self) -> None:
        """End the calls that must not go on: no longer admitted, no longer wanted, or without progress."""
        for call in list(self._calls):
            if call.ending:
                self._abandon(call)
                continue
            try:
                call.check()
                if call.kind != "held":
                    self._check_progress(call)
            except RejectionError as error:
                call.end(error)

    def _abandon(self, call: OpenCall) -> None:
        """End a call that was to end `END_S` ago and waits for a peer that does not read."""
        if call.ends_at is None:
            call.ends_at = self._clock() + END_S
        elif self._clock() >= call.ends_at:
            call.abandon()

    def _check_progress(self, call: OpenCall) -> None:
        """Check that a transfer has moved one part's worth of bytes, or all that is left, within `stall_s`.

        Raises:
            RejectionError: if it has not. A single byte now and then would hold its place as long as an honest upload.
        """
        stall_s, now = self._settings.stall_s, self._clock()
        if now - call.looked_at < stall_s:
            return
        gained = call.num_bytes - call.looked_bytes
        if gained < self._part_bytes and call.left_bytes != 0:
            expected = f"{self._part_bytes} bytes within {stall_s:g} s"
            raise rejection(pb.STALLED, call.kind, expected, gained or "none")
        call.looked_at, call.looked_bytes = now, call.num_bytes

    def _make_room(self, client: str, kind: Kind) -> None:
        """Have the slowest transfer end if all places are taken, and it has had its turn.

        Raises:
            RejectionError: if every place is taken by one that moves, or by one that has only begun.
        """
        others = [call for call in self._calls if call.kind == kind and not call.ending]
        total, now = self._total[kind], self._clock()
        if len(others) < total:
            return
        busy = rejection(pb.BUSY, f"{kind}s", f"at most {total} at once", "one more")
        slowest = min(others, key=lambda call: call.rate(now))
        # A client with a place already does not push others out of theirs.
        if now - slowest.began < TURN_S or any(call.client == client for call in others):
            raise busy
        slowest.end(busy)


class CallQuota:
    """Counts calls and refusals of each client by the minute, before anything else is done with a call."""

    def __init__(self, calls_per_min: int, clock: Callable[[], float]) -> None:
        self._limits = {"calls": calls_per_min, "hellos": HELLOS_PER_MIN, "refusals": REFUSALS_PER_MIN}
        self._clock = clock
        self._counts: dict[str, dict[str, int]] = {}
        self._since = clock()

    def count(self, client: str, what: str = "calls") -> None:
        """Count one call, hello or refusal of a client."""
        counts = self._of(client)
        counts[what] = counts.get(what, 0) + 1

    def check(self, client: str, *, hello: bool = False) -> None:
        """Check what has been counted of a client.

        Raises:
            RejectionError: if it was too much for one minute.
        """
        counts = self._of(client)
        for what, limit in self._limits.items():
            # Up to a limit of calls one is answered; from a limit of refusals on none is.
            most = limit - 1 if what == "refusals" else limit
            if counts.get(what, 0) > most and (hello or what != "hellos"):
                raise rejection(pb.TOO_MANY_CALLS, what, f"at most {limit} a minute", counts[what])

    def _of(self, client: str) -> dict[str, int]:
        # One minute for all, so that what is remembered is forgotten in one step.
        if self._clock() - self._since >= MINUTE_S:
            self._since = self._clock()
            self._counts.clear()
        if client not in self._counts and len(self._counts) >= MAX_NAMES:
            client = ""
        return self._counts.setdefault(client, {})
