"""A site's limit on how fast it sends or receives: what travels is paid for, and the next bytes wait until it is."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from fedtune.errors import ConfigError, Fault
from fedtune.link.client.jobs import Job
from fedtune.link.settings import KIB, JoinSettings
from fedtune.wire.v1 import link_pb2 as pb

BURST_S = 1.0
"""Of the limit that may travel at once."""
MIN_PIECE_BYTES = 4 * KIB
"""Of an upload: a server takes smaller messages for an attack."""
TURN_S = 0.1
SLACK = 0.75
"""Share of the server's patience within which a limited transfer moves what the server asks for."""


class Bandwidth:
    """A token bucket for one direction; every thread of a client shares it."""

    def __init__(self, kib_s: float | None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Begin with a full bucket.

        Args:
            kib_s: KiB per second; None: no limit.
            clock: seconds from any start.
        """
        self._rate = None if kib_s is None else kib_s * KIB
        self._clock, self._lock, self._transfer = clock, threading.Lock(), threading.Lock()
        self._tokens, self._filled_at = 0.0 if self._rate is None else self._rate * BURST_S, clock()

    @property
    def is_limited(self) -> bool:
        return self._rate is not None

    def take(self, num_bytes: int) -> float:
        """Pay for bytes, and return the seconds to wait before anything else is sent, or read, in this direction.

        Small calls, such as signs of life, pay without waiting: a transfer must not hold them up.
        """
        if self._rate is None:
            return 0.0
        with self._lock:
            now = self._clock()
            self._tokens = min(self._rate * BURST_S, self._tokens + (now - self._filled_at) * self._rate)
            self._filled_at = now
            self._tokens -= num_bytes
            return max(0.0, -self._tokens / self._rate)

    def piece(self, part_bytes: int) -> int:
        """Return how many bytes of an upload travel in one message, so that none takes much longer than a second."""
        if self._rate is None:
            return part_bytes
        return min(part_bytes, max(MIN_PIECE_BYTES, int(self._rate * BURST_S)))

    @contextmanager
    def turn(self, job: Job) -> Iterator[None]:
        """Let a transfer have all of a limited direction: of two at once a server would give up both as too slow.

        Raises:
            StoppedError: if the job should give up.
        """
        if self._rate is None:
            yield
            return
        while not self._transfer.acquire(timeout=TURN_S):
            job.check()
        try:
            yield
        finally:
            self._transfer.release()


def check_limits(settings: JoinSettings, limits: pb.Limits) -> None:
    """Check that a server waits long enough for transfers as slow as a site's limits.

    Raises:
        ConfigError: with each limit that is too low for this server.
    """
    patience_s = limits.stall_ms / 1000
    least = limits.part_bytes / (SLACK * patience_s) / KIB
    faults = [
        Fault(
            f"link.{name}",
            f"at least {least:.1f}, as this server gives up transfers of less than {limits.part_bytes // KIB} KiB in "
            f"{patience_s:g} s",
            f"{kib_s:g}",
            "raise it",
        )
        for name in ("max_up_kib_s", "max_down_kib_s")
        if (kib_s := getattr(settings, name)) is not None and kib_s < least
    ]
    if faults:
        raise ConfigError(faults)
