"""Bytes by client within the last 24 hours, in a bounded number of entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

DAY_S = 24 * 3600.0
SPAN_S = 60.0
"""Bytes within so long share an entry: one for each transfer would let a client of many tiny ones fill the memory."""


@dataclass
class Span:
    """Bytes since a moment."""

    began: float
    last: float
    """When the last of them came."""
    num_bytes: int


class DayTraffic:
    """Counts bytes by client; not thread-safe, the dispatcher calls it with its lock held."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Begin with nothing; `clock` returns seconds from any start."""
        self._clock = clock
        self._spans: dict[str, list[Span]] = {}

    def count(self, client: str, num_bytes: int) -> None:
        """Count bytes of a client."""
        now, spans = self._clock(), self._recent(client)
        if spans and now - spans[-1].began < SPAN_S:
            spans[-1].last, spans[-1].num_bytes = now, spans[-1].num_bytes + num_bytes
        else:
            spans.append(Span(now, now, num_bytes))
        self._spans[client] = spans

    def of(self, client: str) -> int:
        """Return the bytes of a client within 24 hours, and with them up to a minute of those before."""
        return sum(span.num_bytes for span in self._recent(client))

    def num_entries(self, client: str) -> int:
        return len(self._spans.get(client, ()))

    def _recent(self, client: str) -> list[Span]:
        now = self._clock()
        spans = self._spans.get(client, [])
        first = next((place for place, span in enumerate(spans) if now - span.last < DAY_S), len(spans))
        del spans[:first]
        return spans
