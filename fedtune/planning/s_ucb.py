"""The planner `s-ucb`: per client a tree over operations and rank, split where it was played; formula ours.

Arms near each other cost and teach about the same. So a reward counts for the whole leaf around the arm that earned it,
and leaves become smaller where a client has taken part often.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from math import inf, log, log2, sqrt
from typing import TypeAlias

import numpy as np

from fedtune.planning.arms import compute_share
from fedtune.planning.policy import Arm, Candidate, Choice, Observed
from fedtune.planning.rewards import relative, with_worst
from fedtune.seeds import derive, generator

Point: TypeAlias = tuple[float, float]

# Of all clients together: one alone takes part some tens of times, too few for a deviation of its own.
RECENT = 500
"""Rewards of all clients over which their common deviation is taken."""
TRIES = 16
"""Points drawn in a leaf before the arm of the least memory in it is taken."""
SMALLEST = 0.15
"""A leaf whose longer side is at most this is not split: it holds one or two arms."""
MIDDLE = 0.25
"""A split lies within the middle half of a side, so that no leaf becomes a sliver."""
PROGRESS, IMPORTANCE = 0.25, 0.25
"""The most that a larger ratio than before, and an important update, add to a reward, as a share of it."""


@dataclass(frozen=True)
class Leaf:
    """A box of the unit square: x is what an arm saves of the operations, y its rank on a logarithmic scale."""

    x: tuple[float, float]
    y: tuple[float, float]

    @property
    def area(self) -> float:
        return (self.x[1] - self.x[0]) * (self.y[1] - self.y[0])

    def holds(self, point: Point) -> bool:
        return self.x[0] <= point[0] < self.x[1] and self.y[0] <= point[1] < self.y[1]

    def split(self, point: Point) -> tuple[Leaf, ...]:
        """Return the two halves across the longer side, cut at the point if that is in the middle half."""
        wide, high = self.x[1] - self.x[0], self.y[1] - self.y[0]
        if max(wide, high) <= SMALLEST:
            return (self,)
        if wide >= high:
            at = into_middle(self.x, point[0])
            return Leaf((self.x[0], at), self.y), Leaf((at, self.x[1]), self.y)
        at = into_middle(self.y, point[1])
        return Leaf(self.x, (self.y[0], at)), Leaf(self.x, (at, self.y[1]))


def into_middle(side: tuple[float, float], at: float) -> float:
    """Return the place nearest to `at` in the middle half of a side."""
    low, high = side
    return min(high - MIDDLE * (high - low), max(low + MIDDLE * (high - low), at))


ROOT = Leaf((0.0, 1.0), (0.0, 1.0))


@dataclass(frozen=True)
class Tree:
    """What is known of one client."""

    leaves: tuple[Leaf, ...] = (ROOT,)
    played: tuple[tuple[float, float, float], ...] = ()
    """(x, y, reward) of its participations; leaves find theirs by position."""
    ratio: float = 0.0
    """Of the last participation."""


@dataclass(frozen=True)
class TreeMemory:
    clients: Mapping[str, Tree] = field(default_factory=dict)
    recent: tuple[float, ...] = ()
    """The last rewards of all clients."""

    @property
    def deviation(self) -> float:
        # Until there are two: 1, the range of a gain; 0 would leave no room to explore.
        return float(np.std(self.recent)) if len(self.recent) > 1 else 1.0


def saving(arm: Arm) -> float:
    """Return about which share of the operations an arm leaves out: for arms that differ in the ratio alone, that."""
    return 1 - compute_share(arm)


def traffic(arm: Arm) -> float:
    """Return the logarithm of the ranks that travel."""
    return log2(arm.rank) + (log2(arm.down_rank) if arm.down_rank is not None else 0.0)


@dataclass(frozen=True)
class SUcb:
    """Plays an arm in the leaf with the largest mean + deviation sqrt(2 ln n / N), and splits that leaf at the arm."""

    arms: tuple[Arm, ...]
    discount: float = 1.0
    """Of a reward, for every later participation of the client."""

    def start(self) -> TreeMemory:
        """Return what is known before the first round: nothing."""
        return TreeMemory()

    def place(self, arm: Arm) -> Point:
        """Return an arm's place in the unit square, below 1 on either side, since leaves are open there."""
        below, (low_x, high_x, low_y, high_y) = 1 - 2**-20, self._box
        x = (saving(arm) - low_x) / (high_x - low_x) if high_x > low_x else 0.0
        y = (traffic(arm) - low_y) / (high_y - low_y) if high_y > low_y else 0.0
        return min(x, below), min(y, below)

    @property
    def _box(self) -> tuple[float, float, float, float]:
        x, y = [saving(arm) for arm in self.arms], [traffic(arm) for arm in self.arms]
        return min(x), max(x), min(y), max(y)

    def choose(self, memory: TreeMemory, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return an arm for every candidate: the feasible one nearest to a point drawn in its best leaf."""
        points, arms, why = [self.place(arm) for arm in self.arms], {}, {}
        for client in candidates:
            tree = memory.clients.get(client.client, Tree())
            leaf, bound = self.best_leaf(tree, memory.deviation, list(compress(points, client.feasible)))
            # A generator per client: an arm does not depend on who else is in the cohort.
            rng = generator(derive(key, "tree", round, client.client))
            arms[client.client] = self.draw_arm(leaf, points, client, rng)
            chance = "not tried yet" if bound == inf else f"bound {bound:.3g}"
            why[client.client] = (
                f"{chance} in saving {leaf.x[0]:.2f}..{leaf.x[1]:.2f}, rank {leaf.y[0]:.2f}..{leaf.y[1]:.2f}"
            )
        return Choice(arms, why=why)

    def best_leaf(self, tree: Tree, deviation: float, points: Sequence[Point]) -> tuple[Leaf, float]:
        """Return the leaf with the largest bound, and the bound, among those that hold one of the feasible points."""
        # Of equal bounds the larger leaf is taken, since less is known of it; then the one that came first.
        bounds = [
            (self.bound(tree, leaf, deviation), leaf.area, -index)
            for index, leaf in enumerate(tree.leaves)
            if any(map(leaf.holds, points))
        ]
        bound, _, place = max(bounds)
        return tree.leaves[-place], bound

    def bound(self, tree: Tree, leaf: Leaf, deviation: float) -> float:
        """Return the upper bound of a leaf's reward; infinite where it was never played."""
        # Age in the client's own participations: by rounds, a client that is drawn rarely would forget it all.
        weights = [self.discount**age for age in range(len(tree.played) - 1, -1, -1)]
        own = [(w, reward) for w, (x, y, reward) in zip(weights, tree.played, strict=True) if leaf.holds((x, y))]
        count = sum(weight for weight, _ in own)
        if not count:
            return inf
        mean = sum(weight * reward for weight, reward in own) / count
        # 1.1 keeps the logarithm above 0 after the first participation.
        return mean + deviation * sqrt(2 * log(max(sum(weights), 1.1)) / count)

    def draw_arm(self, leaf: Leaf, points: Sequence[Point], client: Candidate, rng: np.random.Generator) -> int:
        """Return a feasible arm of the leaf: the one nearest to a point drawn in it, else the one of least memory."""
        for _ in range(TRIES):
            x, y = rng.uniform(*leaf.x), rng.uniform(*leaf.y)
            distances = [(at - x) ** 2 + (up - y) ** 2 for at, up in points]
            nearest = distances.index(min(distances))
            if client.feasible[nearest] and leaf.holds(points[nearest]):
                return nearest
        inside = [index for index, point in enumerate(points) if client.feasible[index] and leaf.holds(point)]
        return min(inside, key=lambda index: client.memory_gb[index])

    def learn(self, memory: TreeMemory, observed: Sequence[Observed]) -> TreeMemory:
        """Return what is known after a round; the leaf of the arm that was really played is split there."""
        paid, clients = self.rewards(memory, observed), dict(memory.clients)
        rewards = with_worst(paid, observed)
        for seen in sorted(observed, key=lambda client: client.client):
            if (reward := rewards.get(seen.client)) is None:
                continue
            tree, point = clients.get(seen.client, Tree()), self.place(seen.arm)
            leaves = tuple(
                part for leaf in tree.leaves for part in (leaf.split(point) if leaf.holds(point) else (leaf,))
            )
            # Progress is counted from the last ratio that reached the global model.
            ratio = seen.arm.ratio if seen.used else tree.ratio
            clients[seen.client] = Tree(leaves, (*tree.played, (*point, reward)), ratio)
        # Measured rewards alone: the lowest, paid again for every client that failed, would widen the deviation.
        return TreeMemory(clients, (*memory.recent, *paid.values())[-RECENT:])

    def rewards(self, memory: TreeMemory, observed: Sequence[Observed]) -> Mapping[str, float]:
        """Return the reward of each client whose losses and time are known, by name."""
        largest = max(arm.ratio for arm in self.arms) or 1.0
        arms, rewards = {seen.client: seen.arm for seen in observed}, {}
        for client, beside in relative(observed).items():
            progress = max(0.0, arms[client].ratio - memory.clients.get(client, Tree()).ratio) / largest
            gain = beside.gain * (1 + PROGRESS * progress) * (1 + IMPORTANCE * beside.importance)
            rewards[client] = gain / (1 + beside.delay)
        return rewards
