"""The planner `s-ucb`: a tree per client that splits where it was played; FedSpine-style, formula ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from math import log, log2, sqrt
from typing import TypeAlias

import numpy as np

from fedtune.planning.policy import Arm, Candidate, Choice, Observed
from fedtune.planning.rewards import relative, with_worst
from fedtune.seeds import derive, generator

Point: TypeAlias = tuple[float, float]

RECENT = 500
TRIES = 16
"""Draws in a leaf before its corner of the least memory is taken."""
SMALLEST = 0.15
"""Side of a leaf that is not split any more."""
MIDDLE = 0.25
"""A split lies within the middle half of a side."""


@dataclass(frozen=True)
class Leaf:
    """A box of the unit square: x is the ratio over the largest, y the rank on a logarithmic scale."""

    x: tuple[float, float]
    y: tuple[float, float]

    @property
    def area(self) -> float:
        return (self.x[1] - self.x[0]) * (self.y[1] - self.y[0])

    def holds(self, point: Point) -> bool:
        return self.x[0] <= point[0] < self.x[1] and self.y[0] <= point[1] < self.y[1]

    def split(self, point: Point) -> tuple[Leaf, ...]:
        """Return the two halves across the longer side, at the point as far as it lies in the middle half."""
        wide, high = self.x[1] - self.x[0], self.y[1] - self.y[0]
        if max(wide, high) <= SMALLEST:
            return (self,)
        if wide >= high:
            at = middle(self.x, point[0])
            return Leaf((self.x[0], at), self.y), Leaf((at, self.x[1]), self.y)
        at = middle(self.y, point[1])
        return Leaf(self.x, (self.y[0], at)), Leaf(self.x, (at, self.y[1]))


def middle(side: tuple[float, float], at: float) -> float:
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
        return float(np.std(self.recent)) if len(self.recent) > 1 else 1.0


@dataclass(frozen=True)
class SUcb:
    """Plays the leaf with the largest R + sd sqrt(2 ln n / N), somewhere in it, and splits it there."""

    arms: tuple[Arm, ...]
    discount: float = 1.0
    """Of a reward per own participation since."""

    def start(self) -> TreeMemory:
        """Return what is known before the first round: nothing."""
        return TreeMemory()

    def place(self, arm: Arm) -> Point:
        """Return an arm's place in the unit square, whose upper ends no arm reaches."""
        largest = max(each.ratio for each in self.arms)
        ranks = [each.rank for each in self.arms]
        low, high = log2(min(ranks)), log2(max(ranks))
        x = arm.ratio / largest if largest else 0.0
        y = (log2(arm.rank) - low) / (high - low) if high > low else 0.0
        below = 1 - 2**-20
        return min(x, below), min(y, below)

    def choose(self, memory: TreeMemory, round: int, candidates: Sequence[Candidate], *, key: int) -> Choice:
        """Return an arm for every candidate: the feasible one nearest to where its best leaf was drawn."""
        points, deviation = [self.place(arm) for arm in self.arms], memory.deviation
        arms, why = {}, {}
        for each in candidates:
            tree = memory.clients.get(each.client, Tree())
            leaf, bound = self.leaf(tree, deviation, list(compress(points, each.feasible)))
            rng = generator(derive(key, "tree", round, each.client))
            arms[each.client] = self.drawn(leaf, points, each, rng)
            chance = "not tried yet" if bound == float("inf") else f"bound {bound:.3g}"
            why[each.client] = (
                f"{chance} in ratio {leaf.x[0]:.2f}..{leaf.x[1]:.2f}, rank {leaf.y[0]:.2f}..{leaf.y[1]:.2f}"
            )
        return Choice(arms, why=why)

    def leaf(self, tree: Tree, deviation: float, points: Sequence[Point]) -> tuple[Leaf, float]:
        """Return the leaf with the largest bound among those that hold an arm that fits; large ones first."""
        weights = [self.discount**age for age in range(len(tree.played) - 1, -1, -1)]
        n, found = sum(weights), list[tuple[float, float, int]]()
        for index, leaf in enumerate(tree.leaves):
            if not any(map(leaf.holds, points)):
                continue
            own = [(w, reward) for w, (x, y, reward) in zip(weights, tree.played, strict=True) if leaf.holds((x, y))]
            count = sum(weight for weight, _ in own)
            bound = float("inf")
            if count:
                mean = sum(weight * reward for weight, reward in own) / count
                bound = mean + deviation * sqrt(2 * log(max(n, 1.1)) / count)
            found.append((bound, leaf.area, -index))
        bound, _, place = max(found)
        return tree.leaves[-place], bound

    def drawn(self, leaf: Leaf, points: Sequence[Point], each: Candidate, rng: np.random.Generator) -> int:
        """Return a feasible arm of the leaf: the one nearest to a point drawn in it, else the one of least memory."""
        for _ in range(TRIES):
            x, y = rng.uniform(*leaf.x), rng.uniform(*leaf.y)
            away = [(at - x) ** 2 + (up - y) ** 2 for at, up in points]
            nearest = away.index(min(away))
            if each.feasible[nearest] and leaf.holds(points[nearest]):
                return nearest
        fitting = [index for index, point in enumerate(points) if each.feasible[index] and leaf.holds(point)]
        return min(fitting, key=lambda index: each.memory_gb[index])

    def learn(self, memory: TreeMemory, observed: Sequence[Observed]) -> TreeMemory:
        """Return what is known after a round; the leaf of the arm that was really played is split there."""
        paid, clients = self.rewards(memory, observed), dict(memory.clients)
        every = with_worst(paid, observed)
        for each in sorted(observed, key=lambda one: one.client):
            tree = clients.get(each.client, Tree())
            reward = every.get(each.client)
            if reward is None:
                continue
            point = self.place(each.arm)
            leaves = tuple(
                part for leaf in tree.leaves for part in (leaf.split(point) if leaf.holds(point) else (leaf,))
            )
            ratio = each.arm.ratio if each.used else tree.ratio
            clients[each.client] = Tree(leaves, (*tree.played, (*point, reward)), ratio)
        return TreeMemory(clients, (*memory.recent, *paid.values())[-RECENT:])

    def rewards(self, memory: TreeMemory, observed: Sequence[Observed]) -> Mapping[str, float]:
        """Return what each client that can be judged is paid, by name."""
        largest = max(arm.ratio for arm in self.arms) or 1.0
        arms, found = {each.client: each.arm for each in observed}, {}
        for client, known in relative(observed).items():
            progress = max(0.0, arms[client].ratio - memory.clients.get(client, Tree()).ratio) / largest
            found[client] = known.gain * (1 + 0.25 * progress) * (1 + 0.25 * known.importance) / (1 + known.delay)
        return found
