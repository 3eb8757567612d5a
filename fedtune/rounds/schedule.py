"""How many rounds a run has, which clients take part in each, and with how many updates one is over."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, inf
from typing import Annotated

from annotated_types import Ge, Gt

from fedtune.messages import Client
from fedtune.rounds.transport import Rule
from fedtune.seeds import derive, generator


@dataclass(frozen=True)
class Schedule:
    """How many rounds, and who takes part; the recipe's table `rounds`."""

    count: Annotated[int, Ge(1)]
    """Rounds of the run."""
    cohort: Annotated[int, Ge(1)] | Annotated[float, Gt(0)] | None = None
    """Clients per round: a whole number of them, or a share of the fleet in (0, 1]; none takes all."""
    min_clients: Annotated[int, Ge(1)] = 1
    """Admitted updates without which a round cannot be completed."""
    max_norm: Annotated[float, Gt(0)] | None = 10.0
    """An update whose change has more than so many times the cohort's median norm is refused; none takes any."""
    deadline_s: Annotated[float, Gt(0)] | None = None
    """Seconds after which a round over a network ends if `min_clients` have answered; none waits for every client."""
    grace_s: Annotated[float, Ge(0)] = 60.0
    """Seconds beyond the deadline that a round over a network waits for `min_clients`."""
    over_select: Annotated[float, Ge(1)] = 1.0
    """Times the cohort that is asked; the round ends with the cohort's number of updates, and the others are late."""
    attempts: Annotated[int, Ge(1)] = 1
    """How often a round over a network is waited for, a deadline each, before too few updates stop the run."""

    @property
    def rule(self) -> Rule:
        return Rule(quorum=self.min_clients, deadline_s=self.deadline_s, grace_s=self.grace_s)


def cohort_size(fleet: int, cohort: int | float | None) -> int:
    """Return how many clients of a fleet a round takes: all, a number of them, or a share rounded up."""
    if cohort is None:
        return fleet
    return min(fleet, cohort if isinstance(cohort, int) else ceil(cohort * fleet - 1e-9))


def enough(asked: int, schedule: Schedule) -> float:
    """Return with how many updates a round ends at once in which so many clients are asked; infinite: when all answer.

    >>> enough(13, Schedule(5, cohort=10, over_select=1.3)), enough(13, Schedule(5, cohort=0.5, over_select=1.3))
    (10, 10)
    """
    if schedule.over_select == 1 or schedule.cohort is None:
        return inf
    if isinstance(schedule.cohort, int):
        return min(schedule.cohort, asked)
    return max(1, int(asked / schedule.over_select + 1e-9))


def sample(
    fleet: Sequence[Client], cohort: int | float | None, *, seed: int, round: int, over_select: float = 1.0
) -> Sequence[Client]:
    """Return the round's clients, sorted by name: all, a number of them, or a share of the fleet rounded up.

    With `over_select` above 1 so many times more are asked, as far as there are any.
    """
    size = min(len(fleet), ceil(over_select * cohort_size(len(fleet), cohort) - 1e-9))
    if size == len(fleet):
        return fleet
    # Positions, not names or ids, are drawn: numpy would turn 64-bit ids into rounded floats.
    drawn = generator(derive(seed, "cohort", round)).choice(len(fleet), size=size, replace=False)
    return [fleet[position] for position in sorted(drawn.tolist())]
