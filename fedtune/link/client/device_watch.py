"""A site's look at its own machine while it is connected: whether it may work now, and an event when that changes."""

from __future__ import annotations

import threading
from collections.abc import Callable

from fedtune.link.audit_log import RecordEvent
from fedtune.link.client.conditions import POLL_S, Conditions


class DeviceWatch:
    """Says whether the machine may work; shared by the threads of a client."""

    def __init__(
        self,
        conditions: Conditions,
        *,
        stop: threading.Event,
        record: RecordEvent,
        after_look: Callable[[], object] = lambda: None,
    ) -> None:
        """Begin with a machine that may work.

        Args:
            conditions: of its work.
            stop: set when the client is to end.
            record: hears when it has to wait, and when it may work again.
            after_look: called each second.
        """
        self._conditions, self._stop, self._record, self._after_look = conditions, stop, record, after_look
        self._lock, self._last = threading.Lock(), ""

    def obstacle(self) -> str:
        """Return why the machine may not work now; empty if it may.

        Raises:
            StoreError: if the state folder cannot be read.
        """
        with self._lock:
            before, self._last = self._last, self._conditions.obstacle()
            if self._last and self._last != before:
                self._record("waits", reason=self._last)
            elif before and not self._last:
                self._record("works")
            return self._last

    def run(self) -> None:
        """Look every second until the client ends."""
        while True:
            self.obstacle()
            self._after_look()
            if self._stop.wait(POLL_S):
                return

    def wait(self) -> bool:
        """Return as soon as the machine may work: True, or False if the client ends before."""
        while self.obstacle():
            if self._stop.wait(POLL_S):
                return False
        return not self._stop.is_set()
