from __future__ import annotations

from itertools import product
from math import exp

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.planning.allocation import ByImportance, OneRank, Targets, by_importance, gain, worth
from fedtune.pruning.structure import Block, BlockLayout

LAYOUT = BlockLayout("llama", tuple(Block(f"layers.{i}", 1, 1, 4, 8) for i in range(3)), 4)
MODULES = {
    "head": (4, 4),  # 8 numbers at rank 1
    **{f"layers.{i}.q": (4, 4) for i in range(3)},
    **{f"layers.{i}.up": (8, 4) for i in range(3)},  # 12
}
TARGETS = Targets(MODULES, LAYOUT)
EVEN = dict.fromkeys(MODULES, 1 / len(MODULES))


def test_depth_takes_modules_in_from_the_top() -> None:
    names = ["head", "layers.2.q", "layers.2.up", "layers.1.q", "layers.1.up", "layers.0.q", "layers.0.up"]
    assert TARGETS.names == names
    assert TARGETS.depths == (3, 2, 1)
    assert [TARGETS.count(depth) for depth in TARGETS.depths] == [7, 5, 3]
    assert [TARGETS.numbers(depth) for depth in TARGETS.depths] == [68, 48, 28]
    ranks = TARGETS.ranks([3, 1, 2])
    assert dict(zip(sorted(MODULES), ranks, strict=True)) == {
        **dict.fromkeys(MODULES, 0),
        "head": 3,
        "layers.2.q": 1,
        "layers.2.up": 2,
    }
    assert (TARGETS.cost(ranks), TARGETS.depth(ranks)) == (3 * 8 + 8 + 24, 1)


def test_modules_outside_of_blocks_alone() -> None:
    alone = Targets({"head": (4, 4)}, LAYOUT)
    assert (alone.depths, alone.count(0), alone.numbers(0), alone.depth((2,))) == ((0,), 1, 8, 0)


def test_rank_one_everywhere_comes_before_any_more() -> None:
    """One module has nearly all importance: within 68 numbers all get rank 1; the next 12 are its own."""
    importance = {**dict.fromkeys(MODULES, 0.01), "layers.0.up": 0.94}
    allocation = by_importance(TARGETS, importance, (1, 2, 4), 200)
    assert allocation.values(3, np.array([67.0]))[0] == -np.inf
    assert set(allocation.ranks(3, 68)) == {1}
    ranks = dict(zip(sorted(MODULES), allocation.ranks(3, 80), strict=True))
    assert ranks == {**dict.fromkeys(MODULES, 1), "layers.0.up": 2}
    # A cut leaves the lowest block out, and with it the important module.
    cut = dict(zip(sorted(MODULES), allocation.ranks(2, 80), strict=True))
    assert cut["layers.0.up"] == cut["layers.0.q"] == 0
    assert min(rank for name, rank in cut.items() if "layers.0" not in name) >= 1


def test_gains_are_of_rank_two() -> None:
    assert gain(np.array([0, 2])).tolist() == pytest.approx([0, 1 - exp(-1)])


importances = st.lists(st.floats(0.01, 1), min_size=7, max_size=7).map(
    lambda values: dict(zip(sorted(MODULES), values, strict=True))
)


@given(importances, st.integers(0, 220), st.integers(1, 3))
@settings(deadline=None)
def test_it_is_the_best_of_all_choices(importance: dict[str, float], budget: int, depth: int) -> None:
    allocation = by_importance(TARGETS, importance, (1, 2), 220)
    count = TARGETS.count(depth)
    options = (TARGETS.ranks(ranks) for ranks in product((1, 2), repeat=count))
    fitting = [worth(TARGETS, ranks, importance) for ranks in options if TARGETS.cost(ranks) <= budget]
    [value] = allocation.values(depth, np.array([float(budget)]))
    assert value == pytest.approx(max(fitting)) if fitting else value == -np.inf
    if fitting:
        ranks = allocation.ranks(depth, budget)
        assert TARGETS.cost(ranks) <= budget
        assert worth(TARGETS, ranks, importance) == pytest.approx(value)


@given(importances, st.lists(st.floats(-10, 300), min_size=2, max_size=9))
@settings(deadline=None)
def test_more_budget_never_gains_less(importance: dict[str, float], budgets: list[float]) -> None:
    rising = np.sort(np.array(budgets))
    allocations: list[ByImportance | OneRank] = [
        by_importance(TARGETS, importance, (1, 2, 4), 220),
        OneRank(TARGETS, (1, 2, 3)),
    ]
    for allocation in allocations:
        values = allocation.values(2, rising)
        assert (values[1:] >= values[:-1]).all()


def test_one_rank_for_all_is_the_largest_that_fits() -> None:
    uniform = OneRank(TARGETS, (1, 2, 3))
    values = uniform.values(3, np.array([67.0, 68.0, 135.9, 136.0, 1e9]))
    assert values.tolist() == pytest.approx([-np.inf, *(gain(np.array([1, 1, 2, 3])).tolist())])
    assert uniform.ranks(3, 140) == (2,) * 7
    assert uniform.values(1, np.array([28.0]))[0] == pytest.approx(3 / 7 * gain(np.array(1)))
    assert worth(TARGETS, uniform.ranks(3, 140), EVEN) == pytest.approx(float(uniform.values(3, np.array([140.0]))[0]))


def test_a_rank_never_exceeds_a_module_s_smaller_side() -> None:
    small = Targets({"layers.0.q": (4, 4), "layers.0.gate": (2, 4)}, LAYOUT)
    importance = {"layers.0.q": 0.01, "layers.0.gate": 0.99}
    ranks = by_importance(small, importance, (1, 2, 4), 1000).ranks(1, 1000)
    assert dict(zip(sorted(small.modules), ranks, strict=True)) == {"layers.0.gate": 2, "layers.0.q": 4}


def test_rank_one_everywhere_fits_where_costs_are_rounded_up() -> None:
    """Millions of numbers, in sizes without a common divisor: rank 1 in all blocks is a budget of exactly that."""
    modules = {f"layers.{i}.{name}": (4099 + i, 11003) for i in range(3) for name in "ab"}
    targets = Targets(modules, LAYOUT)
    importance = dict.fromkeys(modules, 1 / 6)
    allocation = by_importance(targets, importance, (1, 2, 4, 8), 8 * targets.numbers(3))
    assert allocation.programme.unit > 1
    for depth in targets.depths:
        assert set(allocation.ranks(depth, targets.numbers(depth))) - {0} == {1}
        assert allocation.values(depth, np.array([targets.numbers(depth) - 1.0]))[0] == -np.inf
