from __future__ import annotations

import itertools

import numpy as np
import pytest

from fedtune.directions import signs as module
from fedtune.directions.philox import Purpose
from fedtune.directions.signs import bits, sign_words, signs, walsh
from fedtune.tensors import Array
from tests.directions.vectors import SEED, sha


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
    assert bits(np.array([[0x80000005]], np.uint32))[0].tolist() == [1, 0, 1] + [0] * 28 + [1]


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

        monkeypatch.setattr(module, "halves", halves)
        for k in range(2):
            z = signs(0, Purpose.DENSE_SIGNS, 2, k, range(1), 0)[0, :2].astype(float)
            moments[k] += np.outer(z, z) / 16
    np.testing.assert_array_equal(moments, [np.eye(2), np.eye(2)])
