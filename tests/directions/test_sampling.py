from __future__ import annotations

from collections.abc import Callable
from math import e

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions.philox import Purpose
from fedtune.directions.sampling import (
    paper_probabilities,
    quantise_levels,
    repaired_probabilities,
    sample_distinct,
    sample_ids,
    sample_uniform,
    sample_weighted,
    uniform_words,
)
from fedtune.errors import ConfigError
from fedtune.tensors import Array
from tests.directions.vectors import SEED, sha


def test_uniform_ids_are_the_expected_ones() -> None:
    expected = [3346, 2508, 324, 1787, 2329, 937, 2908, 2329, 713, 2128, 515, 262]
    assert sample_uniform(SEED, 12, 4096).tolist() == expected


def test_distinct_ids_are_the_expected_ones() -> None:
    assert sample_distinct(SEED, 8, 8).tolist() == [0, 3, 4, 7, 6, 2, 5, 1]
    drawn = sample_distinct(SEED, 200, 4096)
    assert drawn[:8].tolist() == [343, 1711, 1905, 3554, 2324, 2083, 296, 209]
    assert drawn[-1] == 1218
    assert sha(drawn.astype("<u2")) == "cbc27c666311b03caa0ea5cc79dd6aae8ac9f0335b0208af2c90857099a034e1"


def test_weighted_ids_are_the_expected_ones() -> None:
    drawn = sample_weighted(SEED, 8, np.array([1, 1, 2, 4, 8, 16, 1, 31], np.uint8))
    assert drawn.tolist() == [7, 5, 7, 5, 7, 5, 7, 7]


@settings(max_examples=40, deadline=None)
@given(key=st.integers(0, 2**64 - 1), size=st.sampled_from([1, 2, 64, 4096]), share=st.floats(0, 1))
def test_distinct_ids_never_repeat_and_more_of_them_start_alike(key: int, size: int, share: float) -> None:
    count = int(size * share)
    drawn = sample_distinct(key, size, size)
    assert sorted(drawn.tolist()) == list(range(size))
    np.testing.assert_array_equal(drawn[:count], sample_distinct(key, count, size))


def test_more_distinct_ids_than_there_are_cannot_be_drawn() -> None:
    with pytest.raises(ConfigError, match="expected at most seeds"):
        sample_distinct(SEED, 9, 8)


def test_weighted_ids_follow_their_levels() -> None:
    wanted = np.array([255, 1, 64, 190], np.uint8)
    shares = np.bincount(sample_weighted(SEED, 20_000, wanted), minlength=4) / 20_000
    # Five standard deviations of a share near one half.
    np.testing.assert_allclose(shares, wanted / wanted.sum(dtype=int), atol=5 * 0.5 / np.sqrt(20_000))


def test_equal_levels_cut_the_words_into_equal_ranges() -> None:
    cut = uniform_words(SEED, Purpose.IDS, 50) * np.uint64(8) >> np.uint64(32)
    np.testing.assert_array_equal(sample_weighted(SEED, 50, np.ones(8, np.uint8)), cut)


def test_levels_keep_ratios_within_half_a_level_and_none_is_zero() -> None:
    p = np.array([0.4, 0.3, 0.2999, 0.0001])
    drawn = quantise_levels(p)
    assert drawn.dtype == np.uint8
    assert drawn[0] == 255
    assert drawn[-1] == 1
    np.testing.assert_allclose(drawn / 255, p / p.max(), atol=1 / 255)


@settings(max_examples=40, deadline=None)
@given(key=st.integers(0, 2**64 - 1), size=st.sampled_from([1, 2, 64, 4096]), share=st.floats(0, 1))
def test_each_sampling_draws_by_its_own_rule(key: int, size: int, share: float) -> None:
    count = int(size * share)
    wanted = np.arange(size, dtype=np.uint8) | 1
    for sampling, expected in (
        ("uniform", sample_uniform(key, count, size)),
        ("distinct", sample_distinct(key, count, size)),
        ("pro", sample_weighted(key, count, wanted)),
    ):
        found = sample_ids(key, count, size, sampling=sampling, levels=wanted.tobytes())
        assert found.dtype == np.int32
        assert found.tolist() == expected.tolist()


def test_the_samplings_differ_and_are_below_the_size_of_the_pool() -> None:
    wanted = (np.arange(64, dtype=np.uint8) + 1).tobytes()
    found = {s: sample_ids(SEED, 64, 64, sampling=s, levels=wanted).tolist() for s in ("uniform", "distinct", "pro")}
    assert len({tuple(each) for each in found.values()}) == 3
    assert all(0 <= number < 64 for each in found.values() for number in each)
    assert len(set(found["distinct"])) == 64
    assert len(set(found["uniform"])) < 64


def test_only_pro_needs_levels() -> None:
    assert sample_ids(SEED, 12, 4096, sampling="uniform").tolist() == sample_uniform(SEED, 12, 4096).tolist()
    assert sample_ids(SEED, 8, 8, sampling="distinct").tolist() == [0, 3, 4, 7, 6, 2, 5, 1]
    levels_of_the_spec = bytes([1, 1, 2, 4, 8, 16, 1, 31])
    assert sample_ids(SEED, 8, 8, sampling="pro", levels=levels_of_the_spec).tolist() == [
        7,
        5,
        7,
        5,
        7,
        5,
        7,
        7,
    ]


Rule = Callable[[Array, Array], Array]
RULES = pytest.mark.parametrize("rule", [paper_probabilities, repaired_probabilities], ids=["paper", "repaired"])


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
        paper_probabilities(np.array([4, 0]), np.array([1, 0])), [e / (e + 1), 1 / (e + 1)], rtol=1e-12
    )
    # Histories 0 9 9, 0 3 and 0: means 6, 1.5 and 0, scaled 1, 1/4 and 0.
    powers = np.exp([1, 0.25, 0])
    np.testing.assert_allclose(
        paper_probabilities(np.array([18, 3, 0]), np.array([2, 1, 0])), powers / powers.sum(), rtol=1e-12
    )


def test_the_repaired_rule_by_hand() -> None:
    # The mean of |q| over all five visits is 2; h = (6 + 2)/3, (0 + 2)/2, (4 + 2)/3 and, never drawn, 2/1.
    p = repaired_probabilities(np.array([6, 0, 4, 0]), np.array([2, 1, 2, 0]))
    powers = np.exp([1 / 3, -1 / 2, 0, 0])
    np.testing.assert_allclose(p, 0.9 * powers / powers.sum() + 0.1 / 4, rtol=1e-12)


def test_the_repaired_rule_cuts_a_seed_at_twice_the_mean() -> None:
    # The mean is 2; the first seed's own is 63, far beyond twice that: v is 1 and not 30.5.
    p = repaired_probabilities(np.array([126, 0]), np.array([1, 62]))
    powers = np.exp([1.0, (2 / 63 - 2) / 2])
    np.testing.assert_allclose(p, 0.9 * powers / powers.sum() + 0.05, rtol=1e-12)


@settings(deadline=None)
@given(seen=HISTORIES)
def test_the_papers_rule_never_prefers_a_seed_by_more_than_e(seen: tuple[Array, Array]) -> None:
    p = paper_probabilities(*seen)
    assert p.max() / p.min() <= e * (1 + 1e-12)


@settings(deadline=None)
@given(seen=HISTORIES)
def test_the_papers_rule_gives_a_seed_never_drawn_the_lowest_probability(seen: tuple[Array, Array]) -> None:
    p = paper_probabilities(*seen)
    assert (p[seen[1] == 0] == p.min()).all()


def test_the_repaired_rule_gives_a_seed_never_drawn_what_an_average_one_gets() -> None:
    sizes, visits = history([(10, 4), (0, 0), (30, 4), (20, 4)])
    p = repaired_probabilities(sizes, visits)
    assert p[1] == p[3]
    assert p[0] < p[1] < p[2]
    assert paper_probabilities(sizes, visits).argmin() == 1


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
    p = repaired_probabilities(*seen)
    assert p.min() >= 0.1 / len(p)
    # And no seed is preferred to another by more than v of 1 to v of -1.
    assert p.max() / p.min() <= e**2 * (1 + 1e-12)


@RULES
@settings(deadline=None)
@given(seen=HISTORIES)
def test_levels_reproduce_the_probabilities_within_one_of_255(rule: Rule, seen: tuple[Array, Array]) -> None:
    p = rule(*seen)
    drawn = quantise_levels(p)
    assert drawn.min() >= 1
    assert drawn.max() == 255
    np.testing.assert_allclose(drawn / 255, p / p.max(), rtol=0, atol=1 / 255)
