"""What asynchronous rounds are asked for: the recipe's table `asynchronous`, and what a stale update counts."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from fedtune.rounds.schedule import Schedule, cohort_size


@dataclass(frozen=True)
class AsyncSettings:
    """Rounds that wait for a number of updates and not for their clients, which work on versions of their own
    (FedBuff, AISTATS 2022, arXiv 2106.06639); the recipe's table `asynchronous`.

    A round ends with a buffer of updates; each adds its change since the version that its client was sent, times its
    weight in the buffer and (1 + versions missed) ** -staleness_exponent. Weights are not divided by the sum of these
    factors, so a stale buffer takes a shorter step.
    """

    buffer: Annotated[int, Ge(1)] | None = None
    """Updates that end a round, one of a client at most; with `trigger = "goal"`."""
    concurrency: Annotated[int, Ge(1)] | None = None
    """Clients that work at the same time, times `rounds.over_select`; none: as many as `rounds.cohort` says."""
    staleness_exponent: Annotated[float, Ge(0)] = 0.5
    """How much less an update counts that has missed versions: 0.5 halves it after three; 0 counts all alike."""
    max_staleness: Annotated[int, Ge(0)] = 10
    """Versions that an update may have missed; a client that has missed more is given up, and its place is free. The
    server keeps so many states."""
    trigger: Literal["goal", "time"] = "goal"
    """goal: a round ends when `buffer` updates are in; time: after `budget_s`, with at least `rounds.min_clients`."""
    budget_s: Annotated[float, Gt(0)] | None = None
    """With `trigger = "time"`: seconds of a round, of the simulated clock in a simulation."""
    send: Literal["after-aggregating", "after-receiving"] = "after-aggregating"
    """When a place that is free goes to a client: after the round, so that it works on the new version, or as soon as
    the update is in, on the version of that moment. Either way the place of a client that fails is given away at once
    if the buffer could not be filled without it."""

    def discount(self, staleness: int) -> float:
        """Return the factor on the change of an update that has missed so many versions.

        >>> [AsyncSettings().discount(staleness) for staleness in (0, 3)]
        [1.0, 0.5]
        """
        return float((1.0 + staleness) ** -self.staleness_exponent)

    def goal(self, min_clients: int) -> int:
        """Return how many updates a round needs at least."""
        return self.buffer if self.trigger == "goal" and self.buffer is not None else min_clients

    def working(self, fleet: int, schedule: Schedule) -> int:
        """Return how many clients of a fleet work at the same time.

        >>> AsyncSettings(buffer=2, concurrency=4).working(9, Schedule(over_select=1.5))
        6
        """
        places = cohort_size(fleet, schedule.cohort) if self.concurrency is None else self.concurrency
        return min(fleet, ceil(schedule.over_select * places - 1e-9))
