from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions.bank import DirectionBank, displacement
from fedtune.directions.blocks import all_blocks
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.projection import project
from fedtune.directions.space import directions
from fedtune.errors import ConfigError, ShapeError
from fedtune.seeds import generator
from fedtune.tensors import DTYPES
from tests.directions.vectors import BANKS, SEED, SHAPES, SPACE_NAMES, SPACES, accumulators, weights

EVERY = [*SPACES, *BANKS]
LABELS = [*SPACE_NAMES, *(f"{bank.name}-{bank.size}" for bank in BANKS)]


def slopes(bank: DirectionBank, values: np.ndarray, *, ordinal: int, at: np.ndarray) -> np.ndarray:
    """The definition: one direction after the other, at some places of the newest accumulators."""
    shape, start = values.shape, bank.newest.start
    return np.array(
        [
            bank.direction(start + k, ordinal=ordinal, shape=shape, blocks=all_blocks(shape)).astype(np.float64)
            @ values.reshape(-1).astype(np.float64)
            / 2**bank.halvings
            for k in at.tolist()
        ]
    )


@pytest.mark.parametrize("bank", EVERY, ids=LABELS)
def test_every_slope_is_the_inner_product_with_its_direction(bank: DirectionBank) -> None:
    count = bank.newest.stop - bank.newest.start
    at = generator(1).integers(0, count, 10)
    for shape in SHAPES[:2]:
        values = weights(shape, key=3)
        np.testing.assert_allclose(
            project(bank, values, 5, shape)[at], slopes(bank, values, ordinal=5, at=at), rtol=0, atol=1e-10
        )


@pytest.mark.parametrize("bank", EVERY, ids=LABELS)
def test_a_projection_is_a_rebuild_turned_round(bank: DirectionBank) -> None:
    """<g, y(A)> = sum over k of A_k <g, z_k>, for accumulators of the newest bank."""
    shape = (3, 4099)
    values, sums = weights(shape, key=9), np.zeros(bank.size, np.int32)
    sums[bank.newest] = accumulators(bank, most=1000, used=200)[bank.newest]
    y = displacement(bank, sums, ordinal=9, shape=shape) / 2**bank.halvings
    expected = float(values.reshape(-1).astype(np.float64) @ y)
    assert project(bank, values, 9, shape) @ sums[bank.newest] == pytest.approx(expected, rel=1e-9, abs=1e-6)


@settings(max_examples=25, deadline=None)
@given(
    key=st.integers(0, 2**31),
    size=st.integers(1, 9000),
    seeds=st.sampled_from([1, 2, 32, 1024]),
    groups=st.sampled_from([1, 2, 8]),
)
def test_projections_add_up_and_of_an_orthogonal_direction_they_are_its_length(
    key: int, size: int, seeds: int, groups: int
) -> None:
    bank = directions("hadamard", seeds, [key], groups)
    one, other = weights((size,), key=key), weights((size,), key=key + 1)
    both = project(bank, one.astype(np.float64) + other, 3, (size,))
    np.testing.assert_allclose(both, project(bank, one, 3, (size,)) + project(bank, other, 3, (size,)), atol=1e-9)
    whole = 4096 * -(-size // 4096)
    z = bank.direction(key % seeds, ordinal=3, shape=(whole,), blocks=all_blocks((whole,)))
    expected = np.zeros(groups * seeds)
    expected[key % seeds] = np.count_nonzero(z)
    np.testing.assert_array_equal(project(bank, z, 3, (whole,)), expected)


def test_of_a_tensor_that_is_a_group_only_its_own_numbers_are_other_than_zero() -> None:
    bank = directions("hadamard", 4, [SEED], "tensor", [1, 6])
    found = project(bank, weights((50,)), 6, (50,))
    np.testing.assert_array_equal(found[:4], 0)
    np.testing.assert_array_equal(found[4:], project(Hadamard(4, SEED), weights((50,)), 6, (50,)))
    with pytest.raises(ConfigError, match=r"one of the tensors \[1, 6\]"):
        project(bank, weights((50,)), 2, (50,))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_values_of_every_format_are_summed_in_float64(dtype: str) -> None:
    values = weights((5000,), dtype)
    expected = project(Hadamard(8, SEED), values.astype(np.float64), 1, (5000,))
    np.testing.assert_array_equal(project(Hadamard(8, SEED), values, 1, (5000,)), expected)


def test_another_number_of_values_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"expected values of shape \(3, 4\); got \(4,\)"):
        project(Hadamard(8, SEED), weights((4,)), 1, (3, 4))


def test_a_tensor_without_positions_gives_zeros() -> None:
    np.testing.assert_array_equal(project(Hadamard(8, SEED), np.empty((0, 3), np.float32), 1, (0, 3)), np.zeros(8))
