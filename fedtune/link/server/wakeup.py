"""A flag by which the threads of the link wake the round loop."""

from __future__ import annotations

import threading


class Wakeup:
    """A flag that the round loop waits for: set before the wait, it ends the wait at once."""

    def __init__(self) -> None:
        self._condition, self._is_set = threading.Condition(), False

    def set(self) -> None:
        with self._condition:
            self._is_set = True
            self._condition.notify_all()

    def wait(self, seconds: float) -> None:
        """Wait until the flag is set, at most so long, and clear it."""
        with self._condition:
            if not self._is_set:
                self._condition.wait(seconds)
            self._is_set = False
