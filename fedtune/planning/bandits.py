"""The planners `ucb` and `thompson`: one bandit per client over arms, optimistic, or drawn from what it believes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log, sqrt

import numpy as np

from fedtune.planning.policy import Arm, Candidate, Choice, Observed
from fedtune.planning.rewards import RewardName, rewards, with_worst
from fedtune.seeds import derive, generator

RECENT = 500
"""Rewards of all clients that the common spread is taken over."""


@dataclass(frozen=True)
class Plays:
    """How often one client was asked for an arm, and what that was paid in all."""

    count: int = 0
    total: float = 0.0


@dataclass(frozen=True)
class BanditMemory:
    """What is known of arms, by client and arm, and the last rewards of all clients."""

    plays: Mapping[str, Mapping[Arm, Plays]] = field(default_factory=dict)
    recent: tuple[float, ...] = ()

    @property
    def deviation(self) -> float:
        return float(np.std(self.recent)) if len(self.recent) > 1 else 1.0

    @property
    def mean(self) -> float:
        return float(np.mean(self.recent)) if self.recent else 0.0


def observe_rewards(memory: BanditMemory, observed: Sequence[Observed], reward: RewardName) -> BanditMemory:
    """Return what is known after a round; the arm that was really played is paid."""
    paid, plays = rewards(observed, reward), dict(memory.plays)
    every = with_worst(paid, observed)
    for each in sorted(observed, key=lambda one: one.client):
        if each.client not in every:
            continue
        own = dict(plays.get(each.client, {}))
        before = own.get(each.arm, Plays())
        own[each.arm] = Plays(before.count + 1, before.total + every[each.client])
        plays[each.client] = own
    recent = (*memory.recent, *(paid[client] for client in sorted(paid)))[-RECENT:]
    return BanditMemory(plays, recent)


@dataclass(frozen=True)
class Ucb:
    """UCB1: the largest mean plus sd sqrt(2 ln n / N), arms that were never played first."""

    arms: tuple[Arm, ...]
    """Few, for a client takes part some tens of times."""
    reward: RewardName = "time"

    def start(self) -> BanditMemory:
        """Return what is known before the first round: nothing."""
        return BanditMemory()

    def choose(self, memory: BanditMemory, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return an arm for every candidate; ties go to the lower index."""
        arms, why = {}, {}
        for each in candidates:
            own = memory.plays.get(each.client, {})
            n = sum(plays.count for plays in own.values())
            bounds = [self.bound(own.get(arm, Plays()), n, memory.deviation) for arm in self.arms]
            arms[each.client] = max(
                (index for index, fits in enumerate(each.feasible) if fits), key=lambda index: (bounds[index], -index)
            )
            bound = bounds[arms[each.client]]
            why[each.client] = "not tried yet" if bound == float("inf") else f"bound {bound:.3g} after {n} plays"
        return Choice(arms, why=why)

    @staticmethod
    def bound(plays: Plays, n: int, deviation: float) -> float:
        if not plays.count:
            return float("inf")
        return plays.total / plays.count + deviation * sqrt(2 * log(max(n, 1.1)) / plays.count)

    def learn(self, memory: BanditMemory, observed: Sequence[Observed]) -> BanditMemory:
        """Return what is known after a round."""
        return observe_rewards(memory, observed, self.reward)


@dataclass(frozen=True)
class Thompson:
    """Draws each arm's worth from what is believed of it, mean (S + m0) / (N + 1) and variance v / (N + 1)."""

    arms: tuple[Arm, ...]
    reward: RewardName = "time"

    def start(self) -> BanditMemory:
        """Return what is known before the first round: nothing."""
        return BanditMemory()

    def choose(self, memory: BanditMemory, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return an arm for every candidate."""
        arms, why = {}, {}
        for each in candidates:
            own = memory.plays.get(each.client, {})
            rng = generator(derive(key, "thompson", round, each.client))
            counts = np.array([own.get(arm, Plays()).count for arm in self.arms])
            totals = np.array([own.get(arm, Plays()).total for arm in self.arms])
            means = (totals + memory.mean) / (counts + 1)
            drawn = means + memory.deviation / np.sqrt(counts + 1) * rng.standard_normal(len(self.arms))
            arms[each.client] = int(np.where(each.feasible, drawn, -np.inf).argmax())
            why[each.client] = f"drew {drawn[arms[each.client]]:.3g}"
        return Choice(arms, why=why)

    def learn(self, memory: BanditMemory, observed: Sequence[Observed]) -> BanditMemory:
        """Return what is known after a round."""
        return observe_rewards(memory, observed, self.reward)
