"""The clock of real deployments: what clients say they worked, and what is left of the time until they answered."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.round import Plan
from fedtune.timing import Done, Spent


class Arrivals:
    """Takes times as they were measured; nobody is given up here, for a deadline of the round has done that."""

    def timed(self, round: int, now_s: float, done: Mapping[str, Done]) -> Mapping[str, Spent]:
        """Return, by client, its own seconds of work, and the rest of the time from the first order to its answer."""
        return {
            name: Spent(each.measured.seconds, max(0.0, each.arrived_s - each.measured.seconds))
            for name, each in done.items()
        }

    def cut(self, plans: Mapping[str, Plan], spent: Mapping[str, Spent]) -> Mapping[str, float]:
        return {}
