from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.evaluation import intervals
from fedtune.evaluation.intervals import Z

hits = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=60)
numbers = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


@pytest.mark.parametrize(
    ("right", "items", "low", "high"),
    # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_shares_have_wilsons_interval(right: int, items: int, low: float, high: float) -> None:
    estimate = intervals.share([1.0] * right + [0.0] * (items - right))
    assert (estimate.value, estimate.items) == (right / items, items)
    assert (round(estimate.low or 0, 4), round(estimate.high or 0, 4)) == (low, high)


@given(hits)
def test_a_share_lies_in_its_interval_and_the_mirrored_share_in_the_mirrored_interval(values: list[float]) -> None:
    estimate = intervals.share(values)
    mirrored = intervals.share([1 - value for value in values])
    assert estimate.low is not None
    assert estimate.high is not None
    assert mirrored.high is not None
    assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1
    assert math.isclose(mirrored.high, 1 - estimate.low, abs_tol=1e-12)
    assert estimate.high - estimate.low > 0.05  # of at most 60 items, whatever they are


def test_a_single_item_has_no_standard_error() -> None:
    assert intervals.mean([3.0]) == intervals.Estimate(3.0, None, None, None, 1)
    assert intervals.share([1.0]).stderr is None


def test_means_have_the_normal_interval() -> None:
    estimate = intervals.mean([1.0, 2.0, 3.0])  # deviation 1
    assert estimate.stderr == pytest.approx(1 / math.sqrt(3))
    assert estimate.high == pytest.approx(2 + Z / math.sqrt(3))


def test_the_mean_of_groups_weighs_groups_alike() -> None:
    estimate = intervals.mean_of_groups([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0]])
    assert (estimate.value, estimate.items) == (0.5, 6)
    # Variances of the means: (1/3)/4 and (1/2)/2.
    assert estimate.stderr == pytest.approx(math.sqrt(1 / 12 + 1 / 4) / 2)
    assert intervals.mean_of_groups([[1.0, 0.0], [1.0]]).stderr is None


def test_a_loss_per_token_is_a_ratio_of_sums() -> None:
    estimate = intervals.ratio([2.0, 9.0], [1, 3])  # 11 / 4; residuals -0.75 and 0.75
    assert estimate.value == 2.75
    assert estimate.stderr == pytest.approx(math.sqrt(2 * 2 * 0.75**2) / 4)


@given(numbers, st.floats(0.1, 10))
def test_texts_of_one_length_make_a_ratio_the_mean(sums: list[float], length: float) -> None:
    ratio, mean = intervals.ratio(sums, [length] * len(sums)), intervals.mean([value / length for value in sums])
    assert ratio.value == pytest.approx(mean.value, abs=1e-9)
    assert ratio.stderr == pytest.approx(mean.stderr, abs=1e-9)


@given(numbers, st.floats(-5, 5))
def test_a_shift_of_every_item_is_a_sure_difference(before: list[float], shift: float) -> None:
    estimate = intervals.difference(before, [value + shift for value in before])
    assert estimate.value == pytest.approx(shift, abs=1e-9)
    assert estimate.stderr == pytest.approx(0, abs=1e-9)


def test_a_paired_difference_is_narrower_than_two_intervals_of_the_same_answers() -> None:
    before = [1.0] * 50 + [0.0] * 50
    after = [1.0] * 55 + [0.0] * 45
    estimate = intervals.difference(before, after)
    assert estimate.value == pytest.approx(0.05)
    assert estimate.low is not None
    assert estimate.high is not None
    apart = intervals.share(before), intervals.share(after)
    assert estimate.high - estimate.low < min((e.high or 0) - (e.low or 0) for e in apart) / 2
    # Agresti and Min 2005: 5.5 and 0.5 of 102 changed.
    width = Z * math.sqrt(6 - 25 / 102) / 102
    assert [estimate.low, estimate.high] == pytest.approx([5 / 102 - width, 5 / 102 + width])


def test_equal_answers_to_a_few_items_are_no_proof_of_equality() -> None:
    estimate = intervals.difference([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert estimate.value == 0
    assert estimate.low is not None
    assert estimate.low < -0.2


@given(hits)
def test_no_difference_is_beyond_one(values: list[float]) -> None:
    estimate = intervals.difference([0.0] * len(values), [1.0] * len(values))
    assert estimate.low is not None
    assert estimate.high is not None
    assert -1 <= estimate.low <= estimate.high <= 1


def test_losses_of_the_same_tokens_are_compared_text_by_text() -> None:
    estimate = intervals.difference_of_ratios([2.0, 8.0], [1.0, 5.0], [1, 3])  # residuals 0 and 0
    assert (estimate.value, estimate.stderr) == (-1.0, 0.0)


def test_a_bootstrap_depends_on_its_seed_alone_and_covers_the_mean() -> None:
    values = np.random.default_rng(0).normal(3, 1, 40).tolist()
    first, again = (intervals.bootstrap(values, seed=0, purpose="x") for _ in range(2))
    assert first == again != intervals.bootstrap(values, seed=1, purpose="x")
    normal = intervals.mean(values)
    assert first.low == pytest.approx(normal.low, abs=0.05)
    assert first.high == pytest.approx(normal.high, abs=0.05)
    assert intervals.bootstrap([2.0], seed=0, purpose="x").low is None
