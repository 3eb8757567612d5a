"""The planner `random`: any arm that fits, the baseline that every other planner has to beat."""

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
        """Return None: nothing is learned."""

    def choose(self, memory: None, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return an arm for every candidate."""
        arms = {}
        for client in candidates:
            # A generator per client: an arm depends on the name alone, not on who else is in the cohort.
            rng = generator(derive(key, "random.arm", round, client.client))
            arms[client.client] = int(rng.choice(np.flatnonzero(client.feasible)))
        return Choice(arms, why=dict.fromkeys(arms, "drawn"))

    def learn(self, memory: None, observed: Sequence[Observed]) -> None:
        """Learn nothing."""
