from __future__ import annotations

import numpy as np
import pytest

from fedtune.directions.bank import displacement
from fedtune.directions.blocks import whole
from fedtune.directions.hadamard import Hadamard, fwht
from fedtune.directions.signs import walsh
from fedtune.errors import ShapeError
from fedtune.seeds import generator
from fedtune.tensors import DTYPES
from tests.directions.vectors import LARGE, LARGE_Y, SEED, SMALL, SMALL_Y, large_accumulators, sha


def test_the_tiny_displacements_are_the_expected_ones() -> None:
    for ordinal, (shape, expected) in enumerate(SMALL_Y.items()):
        y = displacement(Hadamard(8, SEED), SMALL, ordinal=ordinal, shape=shape)
        assert y.tolist() == [int(number) for number in expected.split()]


@pytest.mark.parametrize(
    ("size", "start", "last", "most"),
    [
        (4096, [58622, 14462, -11114, -40330, 93574, -4422], -27838, 307178),
        (1024, [7386, 21098, -34210, -36754, -20354, 25858], None, None),
    ],
)
def test_the_larger_displacements_are_the_expected_ones(
    size: int, start: list[int], last: int | None, most: int | None
) -> None:
    y = displacement(Hadamard(size, SEED), large_accumulators(size), ordinal=2, shape=(LARGE,))
    assert y[:6].tolist() == start
    assert last is None or (y[-1], np.abs(y).max()) == (last, most)
    assert sha(y) == LARGE_Y[size]


@pytest.mark.parametrize("size", [1, 2, 32])
def test_the_transform_is_the_product_with_a_walsh_matrix(size: int) -> None:
    x = generator(0).integers(-1000, 1000, (3, 5, size)).astype(np.int32)
    np.testing.assert_array_equal(fwht(x), x @ walsh(size).astype(np.int32))


def test_directions_of_a_block_are_exactly_orthogonal() -> None:
    bank = Hadamard(4096, SEED)
    z = np.stack([bank.direction(k, ordinal=9, shape=(4096,), blocks=range(1)) for k in (*range(40), 4095)])
    np.testing.assert_array_equal(z.astype(int) @ z.T.astype(int), 4096 * np.eye(len(z), dtype=int))


@pytest.mark.parametrize(("length", "orthogonal"), [(96, True), (100, False)])
def test_directions_are_orthogonal_over_whole_groups_only(length: int, orthogonal: bool) -> None:
    bank = Hadamard(16, SEED)
    z = np.stack([bank.direction(k, ordinal=0, shape=(length,), blocks=range(1)) for k in range(16)]).astype(int)
    others = np.abs(z @ z.T - length * np.eye(16, dtype=int))
    assert others.max() == (0 if orthogonal else 4)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_projection_is_the_inner_product_with_every_direction(dtype: str) -> None:
    bank, shape = Hadamard(32, SEED), (3, 1700)
    tensor = generator(1).standard_normal(shape).astype(DTYPES[dtype])
    directions = [bank.direction(k, ordinal=6, shape=shape, blocks=whole(shape)) for k in range(32)]
    expected = [float(tensor.astype(np.float64).reshape(-1) @ z.astype(np.float64)) for z in directions]
    np.testing.assert_allclose(bank.projection(tensor, ordinal=6), expected, rtol=1e-12, atol=1e-10)


def test_projecting_one_direction_finds_it_again() -> None:
    bank = Hadamard(64, SEED)
    z = bank.direction(17, ordinal=0, shape=(8192,), blocks=range(2)).astype(np.float32)
    np.testing.assert_array_equal(bank.projection(z, ordinal=0), 8192.0 * (np.arange(64) == 17))


def test_only_floats_are_projected() -> None:
    with pytest.raises(ShapeError, match="expected a tensor of floats"):
        Hadamard(64, SEED).projection(np.zeros(4, np.int64), ordinal=0)
