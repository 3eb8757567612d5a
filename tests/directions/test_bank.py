from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions.bank import BANK_NAMES, DirectionBank, displacement, headroom, perturb, value_bound
from fedtune.directions.bank import BANKS as CONSTRUCTORS
from fedtune.directions.blocks import all_blocks
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.errors import ConfigError, RoundError, ShapeError
from tests.directions.vectors import BANKS, SEED, SIZES, accumulators

NAMES = [f"{bank.name}-{bank.size}" for bank in BANKS]


@pytest.mark.parametrize("bank", BANKS, ids=NAMES)
def test_a_displacement_is_the_sum_over_all_directions(bank: DirectionBank) -> None:
    sums = accumulators(bank, most=30_000, used=40)
    for size in SIZES:
        shape = (size,) if size != 10_000 else (40, 250)
        y = np.zeros(size, np.int64)
        for k in np.flatnonzero(sums).tolist():
            y += int(sums[k]) * bank.direction(k, ordinal=5, shape=shape, blocks=all_blocks(shape)).astype(np.int64)
        np.testing.assert_array_equal(displacement(bank, sums, ordinal=5, shape=shape), y)


@pytest.mark.parametrize("bank", [Hadamard(64, SEED), Gaussian(8, SEED), Kron(64, SEED)], ids=lambda bank: bank.name)
@settings(max_examples=15, deadline=None)
@given(
    key=st.integers(0, 2**31),
    shape=st.tuples(st.integers(1, 50), st.integers(1, 300)),
    ordinal=st.integers(0, 2**20),
)
def test_displacements_add_up(bank: DirectionBank, key: int, shape: tuple[int, int], ordinal: int) -> None:
    a, b = (accumulators(bank, most=2**20, key=each) for each in (key, key + 1))
    left, right, both = (displacement(bank, sums, ordinal=ordinal, shape=shape) for sums in (a, b, a + b))
    np.testing.assert_array_equal(both, left + right)


@pytest.mark.parametrize("bank", BANKS, ids=NAMES)
def test_a_run_of_blocks_is_the_same_part_of_the_whole(bank: DirectionBank) -> None:
    sums = accumulators(bank, most=99, used=8)
    for shape in ((3, 5001), (15_003,)):
        whole_tensor = displacement(bank, sums, ordinal=2, shape=shape)
        parts = [displacement(bank, sums, ordinal=2, shape=shape, blocks=run) for run in (range(1, 3), range(3, 4))]
        np.testing.assert_array_equal(np.concatenate(parts), whole_tensor[4096:])


@pytest.mark.parametrize("bank", BANKS, ids=NAMES)
def test_every_direction_has_mean_zero_and_variance_one(bank: DirectionBank) -> None:
    n = 2**16
    shape = (256, 256)
    for k in {0, bank.size // 2, bank.size - 1}:
        z = bank.direction(k, ordinal=1, shape=shape, blocks=all_blocks(shape)) / 2**bank.halvings
        # An outer product of signs has as many independent ones as rows, not as positions.
        assert abs(z.mean()) < 5 / np.sqrt(n if bank.name != "kron" else 256)
        spread = 0.0 if bank.max_abs == 1 else 5 * np.sqrt((2.875 - 1) / n)
        assert abs(np.square(z).mean() - 1) <= spread


def test_a_perturbed_history_moves_by_one_direction_and_leaves_the_original() -> None:
    bank = Hadamard(16, SEED)
    sums = accumulators(bank, most=50)
    before = sums.copy()
    moved = displacement(bank, perturb(bank, sums, 3, -700), ordinal=0, shape=(100,))
    z = bank.direction(3, ordinal=0, shape=(100,), blocks=range(1)).astype(np.int32)
    np.testing.assert_array_equal(moved, displacement(bank, sums, ordinal=0, shape=(100,)) - 700 * z)
    np.testing.assert_array_equal(sums, before)


def test_headroom_counts_down_to_the_last_sum_that_fits() -> None:
    full = np.array([2**31 - 1 - 7, -5], np.int64).astype(np.int32)
    bank = Hadamard(2, SEED)
    assert headroom(bank, full) == 2
    assert headroom(bank, full, amount=3) == -1
    assert headroom(Gaussian(2, SEED), np.array([2**28 - 5, 0], np.int32), amount=3) == 1
    y = displacement(bank, np.array([2**31 - 2, -1], np.int32), ordinal=0, shape=(4096,))
    assert np.abs(y.astype(np.int64)).max() == 2**31 - 1
    assert value_bound(Gaussian(2, SEED), np.array([3, -4], np.int32)) == 56


@pytest.mark.parametrize("bank", [Hadamard(4, SEED), Gaussian(4, SEED), Kron(4, SEED)], ids=lambda bank: bank.name)
def test_sums_that_could_leave_32_bits_are_refused(bank: DirectionBank) -> None:
    sums = np.array([(2**31 - 1) // bank.max_abs, 1, 0, 0], np.int32)
    with pytest.raises(RoundError, match=r"accumulators: expected sum \|A\| of at most"):
        displacement(bank, sums, ordinal=0, shape=(2, 2))


@pytest.mark.parametrize(
    "sums", [np.zeros(5, np.int32), np.zeros((2, 2), np.int32), np.zeros(4), np.zeros(4, np.uint32)]
)
def test_accumulators_must_be_k_signed_integers(sums: np.ndarray) -> None:
    with pytest.raises(ShapeError, match="expected 4 signed integers"):
        displacement(Hadamard(4, SEED), sums, ordinal=0, shape=(8,))


@pytest.mark.parametrize(("size", "nearest"), [(0, 1), (3, 2), (1000, 1024), (8192, 4096)])
def test_a_pool_of_another_size_is_refused_with_the_nearest(size: int, nearest: int) -> None:
    with pytest.raises(ConfigError, match=f"seeds: expected a power of 2 .* got {size}; the nearest is {nearest}"):
        Hadamard(size, SEED)


def test_a_kron_pool_is_a_square() -> None:
    with pytest.raises(ConfigError, match=r"power of 4 .* got 2048; the nearest is 1024"):
        Kron(2048, SEED)


def test_a_key_has_64_bits() -> None:
    with pytest.raises(ConfigError, match="key: expected an integer of 64 bits"):
        Gaussian(4, 2**64)


def test_every_bank_stands_under_its_own_name_and_byte() -> None:
    assert {code: CONSTRUCTORS[name](16, 5).code for code, name in BANK_NAMES.items()} == {1: 1, 2: 2, 3: 3}
    assert {name: CONSTRUCTORS[name](16, 5).name for name in CONSTRUCTORS} == {name: name for name in CONSTRUCTORS}
    assert all((bank.size, bank.key) == (16, 5) for bank in (make(16, 5) for make in CONSTRUCTORS.values()))
