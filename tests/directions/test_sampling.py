from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions import sampling as sampling_module
from fedtune.directions.philox import Purpose
from fedtune.directions.sampling import levels, sample_distinct, sample_uniform, sample_weighted, stream
from fedtune.errors import ConfigError
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
    cut = stream(SEED, Purpose.IDS, 50) * np.uint64(8) >> np.uint64(32)
    np.testing.assert_array_equal(sample_weighted(SEED, 50, np.ones(8, np.uint8)), cut)


def test_levels_keep_ratios_within_half_a_level_and_none_is_zero() -> None:
    p = np.array([0.4, 0.3, 0.2999, 0.0001])
    drawn = levels(p)
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
        found = sampling_module.sample_ids(key, count, size, sampling=sampling, levels=wanted.tobytes())
        assert found.dtype == np.int32
        assert found.tolist() == expected.tolist()


def test_the_samplings_differ_and_are_below_the_size_of_the_pool() -> None:
    wanted = (np.arange(64, dtype=np.uint8) + 1).tobytes()
    found = {
        s: sampling_module.sample_ids(SEED, 64, 64, sampling=s, levels=wanted).tolist()
        for s in ("uniform", "distinct", "pro")
    }
    assert len({tuple(each) for each in found.values()}) == 3
    assert all(0 <= number < 64 for each in found.values() for number in each)
    assert len(set(found["distinct"])) == 64
    assert len(set(found["uniform"])) < 64


def test_only_pro_needs_levels() -> None:
    assert (
        sampling_module.sample_ids(SEED, 12, 4096, sampling="uniform").tolist()
        == sample_uniform(SEED, 12, 4096).tolist()
    )
    assert sampling_module.sample_ids(SEED, 8, 8, sampling="distinct").tolist() == [0, 3, 4, 7, 6, 2, 5, 1]
    levels_of_the_spec = bytes([1, 1, 2, 4, 8, 16, 1, 31])
    assert sampling_module.sample_ids(SEED, 8, 8, sampling="pro", levels=levels_of_the_spec).tolist() == [
        7,
        5,
        7,
        5,
        7,
        5,
        7,
        7,
    ]
