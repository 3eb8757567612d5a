from __future__ import annotations

import numpy as np
import pytest

from fedtune.directions.bank import displacement
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.rebuild_numpy import rebuild
from fedtune.errors import ConfigError, ShapeError
from fedtune.tensors import DTYPES
from tests.directions.vectors import (
    LARGE_W0,
    SEED,
    SMALL,
    SMALL_FP32_TIMES_1024,
    accumulators,
    check_no_displacement,
    check_vectors,
    large_w0,
    sha,
    small_w0,
    weights,
)


def test_the_expected_weights_are_rebuilt() -> None:
    assert sha(large_w0()) == LARGE_W0
    check_vectors(rebuild)
    exact = rebuild(small_w0((5,)), SMALL, bank=Hadamard(8, SEED), ordinal=0, exponent=10)
    assert (exact * 1024).tolist() == SMALL_FP32_TIMES_1024


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_displacement_every_bit_of_the_base_comes_back(dtype: str) -> None:
    check_no_displacement(rebuild, dtype)


def test_the_gaussian_bank_counts_in_half_units() -> None:
    bank, sums = Gaussian(2, SEED), np.array([3, -1], np.int32)
    y = displacement(bank, sums, ordinal=0, shape=(50,))
    rebuilt = rebuild(np.zeros(50, np.float32), sums, bank=bank, ordinal=0, exponent=10)
    assert (rebuilt * -2048).tolist() == y.tolist()


def test_a_displacement_beyond_24_bits_is_rounded_to_even_once() -> None:
    bank, sums = Hadamard(1, SEED), np.array([2**24 + 1], np.int32)
    rebuilt = rebuild(np.zeros(8, np.float32), sums, bank=bank, ordinal=0, exponent=0)
    assert set(np.abs(rebuilt).tolist()) == {2.0**24}


def test_the_result_may_have_another_format_and_take_the_place_of_the_base() -> None:
    bank, base = Hadamard(16, SEED), weights((7, 300), "bf16")
    sums, kept = accumulators(bank, most=5000), base.copy()
    wide = rebuild(base, sums, bank=bank, ordinal=1, exponent=20, out=np.empty((7, 300), np.float32))
    assert base.tobytes() == kept.tobytes()
    expected = rebuild(base, sums, bank=bank, ordinal=1, exponent=20)
    assert wide.astype(DTYPES["bf16"]).tobytes() == expected.tobytes()
    assert rebuild(base, sums, bank=bank, ordinal=1, exponent=20, out=base) is base
    assert base.tobytes() == expected.tobytes()


def test_a_weight_beyond_the_range_of_its_format_is_infinite() -> None:
    sums = np.array([2**17], np.int32)
    rebuilt = rebuild(np.zeros(64, np.float16), sums, bank=Hadamard(1, SEED), ordinal=0, exponent=0)
    assert set(rebuilt.astype(float).tolist()) == {np.inf, -np.inf}


def test_a_tensor_in_another_memory_order_is_read_row_by_row() -> None:
    bank, base = Hadamard(16, SEED), weights((30, 50))
    sums = accumulators(bank, most=5000)
    turned = rebuild(np.asfortranarray(base), sums, bank=bank, ordinal=0, exponent=20)
    np.testing.assert_array_equal(turned, rebuild(base, sums, bank=bank, ordinal=0, exponent=20))


@pytest.mark.parametrize("exponent", [-1, 126])
def test_a_unit_out_of_range_is_refused(exponent: int) -> None:
    with pytest.raises(ConfigError, match=f"exponent: expected 0 to 125; got {exponent}"):
        rebuild(weights((4,)), np.zeros(1, np.int32), bank=Hadamard(1, SEED), ordinal=0, exponent=exponent)


def test_a_result_that_does_not_fit_is_refused() -> None:
    sums, bank = np.zeros(1, np.int32), Hadamard(1, SEED)
    for out in (np.empty(5, np.float32), np.empty((4, 2), np.float32)[:, 0]):
        with pytest.raises(ShapeError, match="expected a contiguous result"):
            rebuild(weights((4,)), sums, bank=bank, ordinal=0, exponent=9, out=out)
    with pytest.raises(ShapeError, match="expected weights in fp32, fp16, bf16; got float64"):
        rebuild(np.zeros(4), sums, bank=bank, ordinal=0, exponent=9)
