"""The multiple-choice knapsack behind ranks by module: one rank for each, of the largest summed gain within a budget.

m: modules, c: candidate ranks of a module, u: units of cost
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, gcd

import numpy as np

from fedtune.tensors import Array

MOST_UNITS = 65_536
"""Units into which a budget is divided at most: beyond it, costs are rounded up to whole units."""


@dataclass(frozen=True)
class Group:
    """One module: what each of its candidate ranks costs and gains; exactly one of them is chosen."""

    costs: Sequence[int]
    """Whole numbers of at least 0, one for each candidate."""
    gains: Sequence[float]


@dataclass(frozen=True, eq=False)
class Programme:
    """The best choices over the first k groups, for every k and every budget at once.

    A prefix of the groups is what is left of a model whose lower blocks carry no adapter: so one table answers for
    all depths, all devices and all deadlines that share their gains.
    """

    unit: int
    """Cost of one unit."""
    values: Mapping[int, Array]
    """By k, (u + 1,) float64: the largest gain of the first k groups within a budget; -inf where none fits."""
    picks: Array
    """(m, u + 1), uint8: the candidate of group k that this value takes."""
    units: tuple[tuple[int, ...], ...]
    """By group, its candidates' costs in whole units."""

    def value(self, groups: int, budget: float) -> float:
        """Return the largest gain of the first so many groups within a budget; -inf where none fits."""
        return float(self.values[groups][self.place(budget)]) if budget >= 0 else -np.inf

    def choose(self, groups: int, budget: float) -> tuple[int, ...]:
        """Return the candidate of each of the first so many groups that gives the value of a budget.

        Raises:
            ValueError: if none fits.
        """
        if self.value(groups, budget) == -np.inf:
            raise ValueError(f"expected a budget that {groups} groups fit; got {budget:g}")
        left, chosen = self.place(budget), list[int]()
        for group in range(groups - 1, -1, -1):
            pick = int(self.picks[group, left])
            left -= self.units[group][pick]
            chosen.append(pick)
        return tuple(reversed(chosen))

    def place(self, budget: float) -> int:
        """Return the column of a budget of at least 0, rounded down to whole units."""
        return int(min(budget // self.unit, self.picks.shape[1] - 1))


def solve(
    groups: Sequence[Group], budget: int, *, depths: Sequence[int] | None = None, most_units: int = MOST_UNITS
) -> Programme:
    """Return the exact solution of the multiple-choice knapsack, for all budgets up to one, by dynamic programming.

    Costs count in units of their greatest common divisor; where a budget has more units than `most_units`, in larger
    ones, each cost rounded up: the choice then still fits, and loses at most a unit per group. Of choices of equal gain
    the candidate that is listed first is taken.

    Args:
        groups: in the order in which prefixes are asked for.
        budget: the largest that is asked for, at least 0.
        depths: the prefixes that are asked for; None: all.
        most_units: into which the budget is divided at most.
    """
    unit = max(1, gcd(*(cost for group in groups for cost in group.costs)), ceil(budget / most_units))
    width, stops = budget // unit + 1, set(range(len(groups) + 1) if depths is None else depths)
    row = np.zeros(width)
    values, picks = {0: row}, np.zeros((len(groups), width), np.uint8)
    units = tuple(tuple(-(-cost // unit) for cost in group.costs) for group in groups)
    for k, group in enumerate(groups):
        best = np.full(width, -np.inf)
        for pick, (cost, gain) in enumerate(zip(units[k], group.gains, strict=True)):
            if cost >= width:
                continue
            gained = row[: width - cost] + gain
            # Strictly more: of equal gains the first candidate stays, whatever the platform.
            better = gained > best[cost:]
            np.copyto(best[cost:], gained, where=better)
            np.copyto(picks[k, cost:], np.uint8(pick), where=better)
        row = best
        if k + 1 in stops:
            values[k + 1] = row
    return Programme(unit, values, picks, units)
