"""Events that a client can cause at will, folded: the first of a cause in full, then how many more there were."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from fedtune.link.audit_log import RecordEvent
from fedtune.link.rejections import one_line

WINDOW_S = 60.0
IN_FULL: Mapping[str, int] = {
    "refused": 1,
    "rival": 1,
    "disk": 1,
    "closed": 1,
    "hello": 20,
    "fetched": 60,
    "late": 20,
    "queued": 20,
}
"""Events of one cause that are recorded as they are within a window, by kind; a kind that is not here always is."""
MAX_CAUSES = 4096
"""That are counted apart: a CA names its parties, but nothing here should grow without a bound."""
OTHERS = "(others)"


@dataclass
class Cause:
    """What has happened of one kind, client and code since a moment."""

    since: float
    last: dict[str, int | str]
    count: int = 0
    """Events beyond those in full."""
    seen: int = 0
    num_bytes: int = 0
    """Of those beyond."""


class FoldedEvents:
    """Passes events on so that a flood of them writes a bounded number of bytes; called from several threads."""

    def __init__(self, record: RecordEvent, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._record, self._clock, self._lock = record, clock, threading.Lock()
        self._causes: dict[tuple[str, str, str], Cause] = {}
        self._next_s = float("inf")

    def record(self, kind: str, **fields: int | str) -> None:
        """Pass an event on, or count it."""
        with self._lock:
            now = self._clock()
            # With whatever happens next: a server has an event every few seconds.
            if now >= self._next_s:
                self._close(now)
            if kind not in IN_FULL or self._is_new(kind, fields, now):
                self._record(kind, **fields)

    def flush(self) -> None:
        """Record what was counted; at the end."""
        with self._lock:
            self._close(float("inf"))

    def _is_new(self, kind: str, fields: Mapping[str, int | str], now: float) -> bool:
        key = kind, str(fields.get("client", "")), str(fields.get("code", ""))
        if key not in self._causes and len(self._causes) >= MAX_CAUSES:
            key = kind, OTHERS, ""
        cause = self._causes.setdefault(key, Cause(now, {}))
        self._next_s = min(self._next_s, cause.since + WINDOW_S)
        cause.seen += 1
        if cause.seen <= IN_FULL[kind]:
            return True
        cause.last, cause.count = dict(fields), cause.count + 1
        cause.num_bytes += int(fields.get("bytes", 0))
        return False

    def _close(self, now: float) -> None:
        """Record every cause whose window has ended, and begin anew with it."""
        over = [key for key, cause in self._causes.items() if now - cause.since >= WINDOW_S]
        for key in over:
            cause = self._causes.pop(key)
            if not cause.count:
                continue
            text = f"{cause.count} more of the same within {WINDOW_S:.0f} s"
            if last := str(cause.last.get("reason", "")):
                text = one_line(f"{text}; the last: {last}")
            if "bytes" in cause.last:
                cause.last["bytes"] = cause.num_bytes
            self._record(key[0], **{**cause.last, "count": cause.count, "reason": text})
        self._next_s = min((cause.since + WINDOW_S for cause in self._causes.values()), default=float("inf"))
