from __future__ import annotations

from collections.abc import Callable
from math import e

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions import pro, sampling
from fedtune.tensors import Array

Rule = Callable[[Array, Array], Array]
RULES = pytest.mark.parametrize(
    "rule", [pro.paper_probabilities, pro.repaired_probabilities], ids=["paper", "repaired"]
)


def history(draws: list[tuple[int, int]]) -> tuple[Array, Array]:
    """Return sum of |scalar| and number of visits per seed, from one (mean |scalar|, visits) each."""
    visits = np.array([times for _, times in draws], np.int64)
    return np.array([size * times for size, times in draws], np.int64), visits


HISTORIES = st.lists(st.tuples(st.integers(0, 127), st.integers(0, 10_000)), min_size=1, max_size=64).map(history)


@RULES
@settings(deadline=None)
@given(seen=HISTORIES)
def test_probabilities_sum_to_one_and_none_is_zero(rule: Rule, seen: tuple[Array, Array]) -> None:
    p = rule(*seen)
    assert p.shape == seen[0].shape
    assert p.dtype == np.float64
    assert abs(p.sum() - 1) < 1e-12
    assert (p > 0).all()


def test_the_papers_rule_by_hand() -> None:
    # Histories 0 4 and 0: means 2 and 0, scaled 1 and 0.
    np.testing.assert_allclose(
        pro.paper_probabilities(np.array([4, 0]), np.array([1, 0])), [e / (e + 1), 1 / (e + 1)], rtol=1e-12
    )
    # Histories 0 9 9, 0 3 and 0: means 6, 1.5 and 0, scaled 1, 1/4 and 0.
    powers = np.exp([1, 0.25, 0])
    np.testing.assert_allclose(
        pro.paper_probabilities(np.array([18, 3, 0]), np.array([2, 1, 0])), powers / powers.sum(), rtol=1e-12
    )


def test_the_repaired_rule_by_hand() -> None:
    # The mean of |q| over all five visits is 2; h = (6 + 2)/3, (0 + 2)/2, (4 + 2)/3 and, never drawn, 2/1.
    p = pro.repaired_probabilities(np.array([6, 0, 4, 0]), np.array([2, 1, 2, 0]))
    powers = np.exp([1 / 3, -1 / 2, 0, 0])
    np.testing.assert_allclose(p, 0.9 * powers / powers.sum() + 0.1 / 4, rtol=1e-12)


def test_the_repaired_rule_cuts_a_seed_at_twice_the_mean() -> None:
    # The mean is 2; the first seed's own is 63, far beyond twice that: v is 1 and not 30.5.
    p = pro.repaired_probabilities(np.array([126, 0]), np.array([1, 62]))
    powers = np.exp([1.0, (2 / 63 - 2) / 2])
    np.testing.assert_allclose(p, 0.9 * powers / powers.sum() + 0.05, rtol=1e-12)


@settings(deadline=None)
@given(seen=HISTORIES)
def test_the_papers_rule_never_prefers_a_seed_by_more_than_e(seen: tuple[Array, Array]) -> None:
    p = pro.paper_probabilities(*seen)
    assert p.max() / p.min() <= e * (1 + 1e-12)


@settings(deadline=None)
@given(seen=HISTORIES)
def test_the_papers_rule_gives_a_seed_never_drawn_the_lowest_probability(seen: tuple[Array, Array]) -> None:
    p = pro.paper_probabilities(*seen)
    assert (p[seen[1] == 0] == p.min()).all()


def test_the_repaired_rule_gives_a_seed_never_drawn_what_an_average_one_gets() -> None:
    sizes, visits = history([(10, 4), (0, 0), (30, 4), (20, 4)])
    p = pro.repaired_probabilities(sizes, visits)
    assert p[1] == p[3]
    assert p[0] < p[1] < p[2]
    assert pro.paper_probabilities(sizes, visits).argmin() == 1


@RULES
def test_larger_scalars_and_a_longer_history_of_them_are_preferred(rule: Rule) -> None:
    small, large, larger_but_once = 0, 1, 2
    p = rule(*history([(20, 9), (40, 9), (40, 1), (20, 9)]))
    assert p[small] < p[larger_but_once] < p[large]


@RULES
@pytest.mark.parametrize("visits", [0, 3])
def test_without_a_history_of_anything_but_zeros_all_seeds_are_alike(rule: Rule, visits: int) -> None:
    p = rule(np.zeros(16, np.int64), np.full(16, visits, np.int64))
    np.testing.assert_allclose(p, np.full(16, 1 / 16), rtol=1e-12)


@settings(deadline=None)
@given(seen=HISTORIES)
def test_the_repaired_rule_leaves_every_seed_a_tenth_of_its_equal_share(seen: tuple[Array, Array]) -> None:
    p = pro.repaired_probabilities(*seen)
    assert p.min() >= 0.1 / len(p)
    # And no seed is preferred to another by more than v of 1 to v of -1.
    assert p.max() / p.min() <= e**2 * (1 + 1e-12)


@RULES
@settings(deadline=None)
@given(seen=HISTORIES)
def test_levels_reproduce_the_probabilities_within_one_of_255(rule: Rule, seen: tuple[Array, Array]) -> None:
    p = rule(*seen)
    drawn = sampling.levels(p)
    assert drawn.min() >= 1
    assert drawn.max() == 255
    np.testing.assert_allclose(drawn / 255, p / p.max(), rtol=0, atol=1 / 255)
