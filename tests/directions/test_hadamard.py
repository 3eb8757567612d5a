from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedtune.directions import hadamard as module
from fedtune.directions.bank import displacement
from fedtune.directions.blocks import BLOCK, all_blocks, positions
from fedtune.directions.hadamard import Hadamard, fwht, sign_halves, sign_words, signs, unpack_bits, walsh
from fedtune.directions.philox import Purpose
from fedtune.seeds import generator
from fedtune.tensors import DTYPES, Array
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


def projection(bank: Hadamard, tensor: Array, *, ordinal: int) -> Array:
    """Return the inner products of a tensor with all K directions by the transposed transform, float64 (K,)."""
    flat, products = tensor.reshape(-1), np.zeros(bank.size)
    for block in all_blocks(tensor.shape):
        first, second = sign_halves(bank.key, Purpose.DENSE_SIGNS, range(block, block + 1), ordinal)
        padded = np.zeros(BLOCK)
        real = positions(range(block, block + 1), tensor.shape)
        padded[: len(real)] = flat[real.start : real.stop]
        x = fwht((padded.reshape(-1, BLOCK) * second).reshape(-1, bank.size))
        products += (first.reshape(-1, bank.size) * x).sum(0)
    return products


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_projection_is_the_inner_product_with_every_direction(dtype: str) -> None:
    bank, shape = Hadamard(32, SEED), (3, 1700)
    tensor = generator(1).standard_normal(shape).astype(DTYPES[dtype])
    directions = [bank.direction(k, ordinal=6, shape=shape, blocks=all_blocks(shape)) for k in range(32)]
    expected = [float(tensor.astype(np.float64).reshape(-1) @ z.astype(np.float64)) for z in directions]
    np.testing.assert_allclose(projection(bank, tensor, ordinal=6), expected, rtol=1e-12, atol=1e-10)


def test_projecting_one_direction_finds_it_again() -> None:
    bank = Hadamard(64, SEED)
    z = bank.direction(17, ordinal=0, shape=(8192,), blocks=range(2)).astype(np.float32)
    np.testing.assert_array_equal(projection(bank, z, ordinal=0), 8192.0 * (np.arange(64) == 17))


@pytest.mark.parametrize(
    ("purpose", "block", "ordinal", "places", "expected"),
    [
        (1, 0, 0, range(4), "fa9dff5e 6c10844b 6979c717 0590ff83"),
        (1, 0, 0, range(128, 132), "707268bc c88b591f 7845c73e b6f43e6b"),
        (1, 0, 0, range(252, 256), "63bcd377 b444d838 3da5b099 d116b0e7"),
        (1, 7, 3, range(4), "882661ae 0bd89603 ada167d8 12fddfe9"),
        (2, 0, 1, range(4), "20f4d595 e9627d16 7bbaeeb8 df7a77a7"),
        (3, 0, 1, range(4), "bea15207 9384a808 8362afa7 46504b09"),
    ],
)
def test_sign_words_are_the_expected_ones(purpose: int, block: int, ordinal: int, places: range, expected: str) -> None:
    drawn = sign_words(SEED, Purpose(purpose), range(block, block + 1), ordinal)[0]
    assert [f"{drawn[place]:08x}" for place in places] == expected.split()


def test_sign_blocks_have_the_expected_digests() -> None:
    first = sign_words(SEED, Purpose.DENSE_SIGNS, range(1), 0)
    assert sha(first) == "8788e44f05d4f9d440d1640a8cf1cb326403a0aa8e58e60ae9cb24fd2b0fb0f9"
    eighth = sign_words(SEED, Purpose.DENSE_SIGNS, range(7, 8), 3)
    assert sha(eighth) == "56da59786d51f24dda7048dafe3676fdd4d3e77d19c63c855e835194fc411c3b"


@pytest.mark.parametrize(
    ("size", "direction", "expected"),
    [
        (8, 0, "++----+----+-++-"),
        (8, 1, "-++-+----+----++"),
        (8, 5, "+--++----+--++--"),
        (4096, 0, "++----+-+++-+--+"),
        (4096, 1, "-++-+----+----++"),
        (4096, 5, "+--++---+-++--++"),
    ],
)
def test_the_first_signs_are_the_expected_ones(size: int, direction: int, expected: str) -> None:
    drawn = signs(SEED, Purpose.DENSE_SIGNS, size, direction, range(1), 0)[0]
    assert "".join("+" if sign > 0 else "-" for sign in drawn[:16]) == expected


def test_the_last_signs_of_the_last_direction_are_the_expected_ones() -> None:
    drawn = signs(SEED, Purpose.DENSE_SIGNS, 4096, 4095, range(1), 0)[0]
    assert "".join("+" if sign > 0 else "-" for sign in drawn[4080:]) == "+++++++-+++---+-"


def test_bits_come_lowest_first() -> None:
    assert unpack_bits(np.array([[0x80000005]], np.uint32))[0].tolist() == [1, 0, 1] + [0] * 28 + [1]


def test_a_walsh_matrix_is_the_parity_of_common_bits() -> None:
    expected = [[(-1) ** (k & j).bit_count() for j in range(16)] for k in range(16)]
    assert walsh(16).tolist() == expected


def test_over_all_random_bits_each_direction_is_a_vector_of_independent_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = np.zeros((2, 2, 2))
    for drawn in itertools.product([1, -1], repeat=4):

        def halves(*_: object, drawn: tuple[int, ...] = drawn) -> tuple[Array, Array]:
            first, second = np.ones((1, 4096), np.int8), np.ones((1, 4096), np.int8)
            first[0, :2], second[0, :2] = drawn[:2], drawn[2:]
            return first, second

        monkeypatch.setattr(module, "sign_halves", halves)
        for k in range(2):
            z = signs(0, Purpose.DENSE_SIGNS, 2, k, range(1), 0)[0, :2].astype(float)
            moments[k] += np.outer(z, z) / 16
    np.testing.assert_array_equal(moments, [np.eye(2), np.eye(2)])
