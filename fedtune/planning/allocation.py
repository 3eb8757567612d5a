"""Ranks by module under a budget of trained numbers: rank 1 everywhere first, the rest by importance, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from fedtune.planning.importance import Importance
from fedtune.planning.knapsack import Group, Programme, solve
from fedtune.pruning.depth import block_of
from fedtune.pruning.structure import BlockLayout
from fedtune.tensors import Array

SATURATION = 2.0
"""Rank at which a module has gained 63 % of what it can: breadth wins over rank."""


@dataclass(frozen=True)
class Targets:
    """The target modules in the order in which depth takes them in: outside of blocks, then from the top block down."""

    modules: Mapping[str, tuple[int, int]]
    """(out, in) by name."""
    layout: BlockLayout

    @cached_property
    def names(self) -> Sequence[str]:
        """By falling block; names sort the modules of one."""
        blocks = len(self.layout.blocks)
        return sorted(self.modules, key=lambda name: (-self.places.get(name, blocks), name))

    @cached_property
    def places(self) -> Mapping[str, int]:
        """The number of each module's block; modules outside of blocks are left out."""
        places = {name: block_of(name, self.layout) for name in self.modules}
        return {name: place for name, place in places.items() if place is not None}

    @cached_property
    def blocks(self) -> Sequence[int]:
        """The numbers of the blocks with modules, from the top."""
        return sorted(set(self.places.values()), reverse=True)

    @cached_property
    def depths(self) -> Sequence[int]:
        """The numbers of blocks that may be trained, the largest first; (0,) where no module is in a block."""
        return tuple(range(len(self.blocks), 0, -1)) or (0,)

    def count(self, depth: int) -> int:
        """Return how many modules so many blocks, from the top, take in."""
        return self._counts[depth]

    @cached_property
    def _counts(self) -> Mapping[int, int]:
        blocks = [self.blocks.index(self.places[name]) if name in self.places else -1 for name in self.names]
        return {depth: sum(block < depth for block in blocks) for depth in (0, *self.depths)}

    @cached_property
    def sides(self) -> Sequence[int]:
        """Out + in of each module in `names`: the numbers of an adapter of rank 1."""
        return [sum(self.modules[name]) for name in self.names]

    def numbers(self, depth: int) -> int:
        """Return the numbers of an adapter of rank 1 in every module of a depth."""
        return self._numbers[depth]

    @cached_property
    def _numbers(self) -> Mapping[int, int]:
        return {depth: sum(self.sides[: self.count(depth)]) for depth in (0, *self.depths)}

    @cached_property
    def by_name(self) -> Sequence[str]:
        """In the order of a plan's ranks."""
        return sorted(self.modules)

    def cost(self, ranks: Sequence[int]) -> int:
        """Return the numbers of an adapter of these ranks, by sorted name."""
        pairs = zip(self.by_name, ranks, strict=True)
        return sum(rank * sum(self.modules[name]) for name, rank in pairs)

    def depth(self, ranks: Sequence[int]) -> int:
        """Return through how many blocks, from the top, ranks by sorted name reach."""
        trained = [name for name, rank in zip(self.by_name, ranks, strict=True) if rank > 0]
        lowest = min((self.places[name] for name in trained if name in self.places), default=None)
        return 0 if lowest is None else self.blocks.index(lowest) + 1

    def ranks(self, ranks: Sequence[int]) -> tuple[int, ...]:
        """Return ranks of the first modules in `names` by sorted name, 0 for the others."""
        own = dict(zip(self.names, ranks, strict=False))
        return tuple(own.get(name, 0) for name in self.by_name)


class Allocation(Protocol):
    """Which ranks a budget buys, at every depth."""

    def values(self, depth: int, budgets: Array) -> Array:
        """Return what the modules of a depth gain within each budget of numbers; -inf where none fits."""
        ...

    def ranks(self, depth: int, budget: float) -> tuple[int, ...]:
        """Return the ranks, by sorted name, that gain this within a budget."""
        ...


def gain(rank: Array) -> Array:
    """Return the share of its importance that a module gains at a rank: 1 - e^(-rank / 2)."""
    return np.asarray(1 - np.exp(-np.asarray(rank, np.float64) / SATURATION))


def worth(targets: Targets, ranks: Sequence[int], importance: Importance) -> float:
    """Return what ranks by sorted name gain."""
    shares = np.array([importance[name] for name in targets.by_name])
    return float(shares @ gain(np.array(ranks)))


@dataclass(frozen=True, eq=False)
class ByImportance:
    """Rank 1 in every module first; what is left of the budget where it gains most."""

    targets: Targets
    programme: Programme
    """Over the ranks above the first."""
    candidates: Sequence[int]
    first: Mapping[int, float]
    """By depth, what the first rank gains in all of its modules."""

    def values(self, depth: int, budgets: Array) -> Array:
        row, left = self.programme.values[self.targets.count(depth)], budgets - self.targets.numbers(depth)
        places = np.minimum(np.floor_divide(np.maximum(left, 0), self.programme.unit), len(row) - 1)
        return np.where(left < 0, -np.inf, self.first[depth] + row[places.astype(np.int64)])

    def ranks(self, depth: int, budget: float) -> tuple[int, ...]:
        picks = self.programme.choose(self.targets.count(depth), budget - self.targets.numbers(depth))
        return self.targets.ranks([self.candidates[pick] for pick in picks])


def by_importance(targets: Targets, importance: Importance, candidates: Sequence[int], budget: int) -> ByImportance:
    """Return the exact allocation for all budgets up to one.

    Args:
        targets: the modules.
        importance: of each of them.
        candidates: ranks to choose from, beside 1.
        budget: the largest, in numbers.
    """
    ordered = sorted({1, *candidates})
    gains = gain(np.array(ordered))
    groups = []
    for name, side in zip(targets.names, targets.sides, strict=True):
        # A rank beyond the smaller side of a layer adds nothing to it.
        fitting = [rank for rank in ordered if rank <= max(1, min(targets.modules[name]))]
        more = importance[name] * (gains[: len(fitting)] - gains[0])
        groups.append(Group([(rank - 1) * side for rank in fitting], more.tolist()))
    shares = np.cumsum([0.0, *(importance[name] for name in targets.names)])
    counts = {depth: targets.count(depth) for depth in targets.depths}
    # The first ranks are no part of it: costs that are rounded up must not keep them from fitting.
    left = max(0, budget - min(targets.numbers(depth) for depth in targets.depths))
    return ByImportance(
        targets,
        solve(groups, left, depths=list(counts.values())),
        ordered,
        {depth: float(gains[0] * shares[count]) for depth, count in counts.items()},
    )


@dataclass(frozen=True)
class OneRank:
    """The same rank in every module of a depth: the largest candidate that a budget allows."""

    targets: Targets
    candidates: Sequence[int]
    """Rising."""

    def values(self, depth: int, budgets: Array) -> Array:
        places = np.searchsorted(np.array(self.candidates) * self.targets.numbers(depth), budgets, side="right")
        share = self.targets.count(depth) / len(self.targets.modules)
        return np.concatenate([[-np.inf], share * gain(np.array(self.candidates))])[places]

    def ranks(self, depth: int, budget: float) -> tuple[int, ...]:
        place = int(np.searchsorted(np.array(self.candidates) * self.targets.numbers(depth), budget, side="right"))
        assert place > 0  # asked for only where the value is finite
        return self.targets.ranks([self.candidates[place - 1]] * self.targets.count(depth))
