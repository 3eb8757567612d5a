"""The oracle: what `deadline` would choose if it knew the round's rates and the true qualities; for regret."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.planning.deadline import LATE_SHARE, best, deadlines
from fedtune.planning.policy import Arm, Candidate, Choice, Observed
from fedtune.tensors import Array


@dataclass(frozen=True)
class Oracle:
    """Never a planner of a deployment: nobody can know what it is told."""

    arms: tuple[Arm, ...]
    seconds: Callable[[int, Candidate], Array]
    """(round, client) -> true seconds of every arm in that round."""
    worth: Callable[[int, Candidate], Array]
    """(round, client) -> true worth of every arm."""
    server_s: float = 0.0

    def start(self) -> None:
        """Return nothing: it knows."""

    def choose(self, memory: None, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return the arms with the largest true worth per true second."""
        if not candidates:
            return Choice({})
        cohort = sorted(candidates, key=lambda each: each.client)
        seconds = np.array([self.seconds(round, each) for each in cohort])
        seconds = np.where([each.feasible for each in cohort], seconds, np.inf)
        worth = np.array([self.worth(round, each) for each in cohort])
        weights = np.array([each.weight for each in cohort])
        chosen, end = best(seconds, worth, weights, deadlines(seconds), self.server_s)
        arms = {each.client: int(arm) for each, arm in zip(cohort, chosen, strict=True)}
        return Choice(arms, deadline_s=LATE_SHARE * end, why=dict.fromkeys(arms, "known"))

    def learn(self, memory: None, observed: Sequence[Observed]) -> None:
        """Learn nothing."""
