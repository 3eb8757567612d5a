"""The planners `ucb` and `thompson`: one bandit per client over arms, choosing by a bound or by a draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf, log, sqrt

import numpy as np

from fedtune.planning.policy import Arm, Candidate, Choice, Observed
from fedtune.planning.rewards import RewardName, rewards, with_worst
from fedtune.seeds import derive, generator

# Of all clients together: one alone takes part some tens of times, too few for a deviation of its own.
RECENT = 500
"""Rewards of all clients over which their common mean and deviation are taken."""


@dataclass(frozen=True)
class Plays:
    """How often one client played an arm, and the sum of its rewards."""

    count: int = 0
    total: float = 0.0


UNPLAYED = Plays()


@dataclass(frozen=True)
class BanditMemory:
    """What is known of arms, by client and arm, and the last rewards of all clients."""

    plays: Mapping[str, Mapping[Arm, Plays]] = field(default_factory=dict)
    recent: tuple[float, ...] = ()

    @property
    def deviation(self) -> float:
        # Until there are two: 1, the range of a gain; 0 would leave no room to explore.
        return float(np.std(self.recent)) if len(self.recent) > 1 else 1.0

    @property
    def mean(self) -> float:
        return float(np.mean(self.recent)) if self.recent else 0.0


def observe_rewards(memory: BanditMemory, observed: Sequence[Observed], reward: RewardName) -> BanditMemory:
    """Return what is known after a round; the arm that was really played is paid."""
    paid, plays = rewards(observed, reward), dict(memory.plays)
    with_unused = with_worst(paid, observed)
    for seen in sorted(observed, key=lambda client: client.client):
        if seen.client not in with_unused:
            continue
        own = dict(plays.get(seen.client, {}))
        before = own.get(seen.arm, UNPLAYED)
        own[seen.arm] = Plays(before.count + 1, before.total + with_unused[seen.client])
        plays[seen.client] = own
    # Only measured rewards: the lowest, paid again for every client that failed, would widen the deviation.
    recent = (*memory.recent, *(paid[client] for client in sorted(paid)))[-RECENT:]
    return BanditMemory(plays, recent)


@dataclass(frozen=True)
class Ucb:
    """UCB1: the largest mean plus deviation sqrt(2 ln n / N); arms that were never played come first."""

    arms: tuple[Arm, ...]
    """Few of them: a client takes part some tens of times."""
    reward: RewardName = "time"

    def start(self) -> BanditMemory:
        """Return what is known before the first round: nothing."""
        return BanditMemory()

    def choose(self, memory: BanditMemory, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return an arm for every candidate; ties go to the lower index."""
        arms, why = {}, {}
        for client in candidates:
            own = memory.plays.get(client.client, {})
            n = sum(plays.count for plays in own.values())
            bounds = [self.bound(own.get(arm, UNPLAYED), n, memory.deviation) for arm in self.arms]
            feasible = [index for index, fits in enumerate(client.feasible) if fits]
            arm = max(feasible, key=lambda index: (bounds[index], -index))
            arms[client.client] = arm
            why[client.client] = "not tried yet" if bounds[arm] == inf else f"bound {bounds[arm]:.3g} after {n} plays"
        return Choice(arms, why=why)

    @staticmethod
    def bound(plays: Plays, n: int, deviation: float) -> float:
        """Return the upper bound of an arm's reward after n plays of the client; infinite for an arm never played."""
        if not plays.count:
            return inf
        # UCB1 takes rewards from 0 to 1: the deviation scales its bound. 1.1 keeps the logarithm above 0 at first.
        return plays.total / plays.count + deviation * sqrt(2 * log(max(n, 1.1)) / plays.count)

    def learn(self, memory: BanditMemory, observed: Sequence[Observed]) -> BanditMemory:
        """Return what is known after a round."""
        return observe_rewards(memory, observed, self.reward)


@dataclass(frozen=True)
class Thompson:
    """Draws each arm's reward from its posterior, of mean (S + m0) / (N + 1) and variance v / (N + 1).

    The prior of every arm is one play that earned m0, the mean of all clients' recent rewards.
    """

    arms: tuple[Arm, ...]
    reward: RewardName = "time"

    def start(self) -> BanditMemory:
        """Return what is known before the first round: nothing."""
        return BanditMemory()

    def choose(self, memory: BanditMemory, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return an arm for every candidate."""
        arms, why = {}, {}
        for client in candidates:
            own = memory.plays.get(client.client, {})
            rng = generator(derive(key, "thompson", round, client.client))
            counts = np.array([own.get(arm, UNPLAYED).count for arm in self.arms])
            totals = np.array([own.get(arm, UNPLAYED).total for arm in self.arms])
            means = (totals + memory.mean) / (counts + 1)
            # Drawn for all arms and masked afterwards: the draw of an arm does not depend on which others fit.
            drawn = means + memory.deviation / np.sqrt(counts + 1) * rng.standard_normal(len(self.arms))
            arms[client.client] = int(np.where(client.feasible, drawn, -np.inf).argmax())
            why[client.client] = f"drew {drawn[arms[client.client]]:.3g}"
        return Choice(arms, why=why)

    def learn(self, memory: BanditMemory, observed: Sequence[Observed]) -> BanditMemory:
        """Return what is known after a round."""
        return observe_rewards(memory, observed, self.reward)
