from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import exp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.planning.knapsack import Group, solve

RANKS = (0, 2, 4)


def total(groups: Sequence[Group], picks: Sequence[int]) -> tuple[int, float]:
    pairs = list(zip(groups, picks, strict=True))
    return sum(group.costs[pick] for group, pick in pairs), sum(group.gains[pick] for group, pick in pairs)


def brute_force(groups: Sequence[Group], budget: float) -> float:
    every = (total(groups, picks) for picks in product(*(range(len(group.costs)) for group in groups)))
    return max((gain for cost, gain in every if cost <= budget), default=-np.inf)


def greedy(groups: Sequence[Group], budget: float) -> float:
    """The plain way: from the cheapest candidates on, the step with the most gain per cost that still fits."""
    picks = [0] * len(groups)
    while True:
        spent, gain = total(groups, picks)
        steps = [
            ((group.gains[new] - group.gains[old]) / (group.costs[new] - group.costs[old]), place, new)
            for place, (group, old) in enumerate(zip(groups, picks, strict=True))
            for new in range(old + 1, len(group.costs))
            if spent + group.costs[new] - group.costs[old] <= budget
        ]
        if not steps:
            return gain
        _, place, new = max(steps)
        picks[place] = new


def test_the_example_on_paper() -> None:
    """S = (1, .5), rho = 4: steps worth .3935 and .2387 of the first matrix, .1967 of the second; budget 3 units."""
    groups = [Group((0, 1, 2), [s * (1 - exp(-r / 4)) for r in RANKS]) for s in (1.0, 0.5)]
    programme = solve(groups, 3)
    assert [RANKS[pick] for pick in programme.choose(2, 3)] == [4, 2]
    assert programme.value(2, 3) == pytest.approx(0.8289, abs=5e-5)


def test_gain_per_cost_alone_is_not_enough() -> None:
    """Items (.6, cost 2) and (1.0, cost 4), budget 4: by gain per cost .6 is taken, and nothing fits beside it."""
    groups = [Group((0, 2), (0.0, 0.6)), Group((0, 4), (0.0, 1.0))]
    assert greedy(groups, 4) == 0.6
    programme = solve(groups, 4)
    assert (programme.value(2, 4), programme.choose(2, 4)) == (1.0, (0, 1))


def test_a_budget_that_nothing_fits() -> None:
    programme = solve([Group((3, 6), (1.0, 2.0))], 12)
    assert programme.unit == 3
    assert [programme.value(1, budget) for budget in (-1, 2, 3, 5, 6, 99)] == [-np.inf, -np.inf, 1.0, 1.0, 2.0, 2.0]
    with pytest.raises(ValueError, match="expected a budget that 1 groups fit; got 2"):
        programme.choose(1, 2)


instances = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.floats(0, 1, width=32)), min_size=1, max_size=4), min_size=1, max_size=4
).map(lambda rows: [Group([cost for cost, _ in row], [gain for _, gain in row]) for row in rows])


@given(instances, st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_it_equals_brute_force_for_every_prefix_and_budget(groups: list[Group], budget: int) -> None:
    programme = solve(groups, budget)
    for prefix in range(1, len(groups) + 1):
        for smaller in {budget, budget // 2, 0}:
            best = brute_force(groups[:prefix], smaller)
            assert programme.value(prefix, smaller) == pytest.approx(best)
            if best > -np.inf:
                cost, gain = total(groups[:prefix], programme.choose(prefix, smaller))
                assert cost <= smaller
                assert gain == pytest.approx(best)


@given(st.lists(st.tuples(st.integers(1, 9), st.floats(0, 1)), min_size=1, max_size=4), st.integers(0, 60))
@settings(deadline=None)
def test_it_is_never_below_the_greedy_choice_nor_falls_with_the_budget(
    rows: list[tuple[int, float]], budget: int
) -> None:
    groups = [Group([r * cost for r in RANKS], [s * (1 - exp(-r / 2)) for r in RANKS]) for cost, s in rows]
    programme = solve(groups, budget)
    assert programme.value(len(groups), budget) >= greedy(groups, budget) - 1e-12
    row = programme.values[len(groups)]
    assert (row[1:] >= row[:-1]).all()


@given(instances, st.integers(1, 60), st.integers(1, 5))
@settings(deadline=None)
def test_rounding_costs_up_never_breaks_a_budget(groups: list[Group], budget: int, most: int) -> None:
    programme = solve(groups, budget, most_units=most)
    assert programme.picks.shape[1] <= most + 1
    if programme.value(len(groups), budget) > -np.inf:
        assert total(groups, programme.choose(len(groups), budget))[0] <= budget


def test_only_the_depths_that_are_asked_for_stay_in_memory() -> None:
    groups = [Group((0, 1), (0.0, 1.0))] * 6
    programme = solve(groups, 4, depths=(2, 6))
    assert sorted(programme.values) == [0, 2, 6]
    assert (programme.value(2, 4), programme.value(6, 4)) == (2.0, 4.0)
