"""The planner `random`: any arm that fits, which is what every other one has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.planning.policy import Arm, Candidate, Choice, Observed
from fedtune.seeds import derive, generator


@dataclass(frozen=True)
class RandomChoice:
    """Draws uniformly among the arms that fit a client."""

    arms: tuple[Arm, ...]

    def start(self) -> None:
        """Return nothing: it learns nothing."""

    def choose(self, memory: None, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return an arm for every candidate."""
        arms = {}
        for each in candidates:
            rng = generator(derive(key, "random.arm", round, each.client))
            arms[each.client] = int(rng.choice(np.flatnonzero(each.feasible)))
        return Choice(arms, why=dict.fromkeys(arms, "drawn"))

    def learn(self, memory: None, observed: Sequence[Observed]) -> None:
        """Learn nothing."""
