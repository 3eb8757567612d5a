from __future__ import annotations

import numpy as np
import pytest

from fedtune.directions.bank import displacement
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.errors import ConfigError
from fedtune.tensors import Array
from tests.directions.vectors import SEED, accumulators

M = np.array([[1, -2, 3, 0], [0, 5, -7, 4], [2, 2, -1, 0], [6, -3, 0, 1]], np.int32)


def lines(signs: Array) -> list[str]:
    return ["".join("+" if sign > 0 else "-" for sign in row) for row in signs]


def test_the_factors_are_the_expected_ones() -> None:
    u, v = Kron(16, SEED).factors(1, (6, 10))
    assert lines(u) == ["+---++", "--+--+", "+-++--", "---++-"]
    assert lines(v) == ["+--++-++++", "++--+++--+", "+-+-+---++", "----++-++-"]


def test_the_displacements_are_the_expected_ones() -> None:
    y = displacement(Kron(16, SEED), M.reshape(-1), ordinal=1, shape=(6, 10)).reshape(6, 10)
    assert y[0].tolist() == [9, -3, 19, -5, -1, -13, -9, -15, 3, 9]
    assert y[1].tolist() == [-1, 7, 21, -7, -11, -3, -11, -17, -7, -1]
    assert y[5].tolist() == [-9, 11, -3, -11, -3, 17, -3, -5, -11, -9]


@pytest.mark.parametrize("most", [100, 2**23])
def test_sums_beyond_24_bits_are_exact_too(most: int) -> None:
    bank = Kron(64, SEED)
    sums = accumulators(bank, most=most)
    u, v = bank.factors(0, (37, 5000))
    expected = u.T.astype(np.int64) @ sums.reshape(8, 8).astype(np.int64) @ v.astype(np.int64)
    np.testing.assert_array_equal(displacement(bank, sums, ordinal=0, shape=(37, 5000)), expected.reshape(-1))


def test_a_large_matrix_is_computed_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = Kron(64, SEED)
    sums = accumulators(bank, most=100)
    at_once = displacement(bank, sums, ordinal=0, shape=(50, 700))
    monkeypatch.setattr("fedtune.directions.kron.PIECE", 2000)
    pieces = list(bank.pieces(sums, ordinal=0, shape=(50, 700), blocks=range(9)))
    assert len(pieces) == 25
    np.testing.assert_array_equal(np.concatenate(pieces), at_once)


def test_a_vector_has_the_directions_of_the_hadamard_bank() -> None:
    bank = Kron(16, SEED)
    sums = accumulators(bank, most=100)
    expected = displacement(Hadamard(16, SEED), sums, ordinal=7, shape=(70,))
    np.testing.assert_array_equal(displacement(bank, sums, ordinal=7, shape=(70,)), expected)


def test_a_tensor_of_three_dimensions_has_no_directions() -> None:
    with pytest.raises(ConfigError, match="at most two dimensions for 'kron'"):
        displacement(Kron(16, SEED), np.zeros(16, np.int32), ordinal=0, shape=(2, 3, 4))


def test_an_empty_matrix_has_no_displacements() -> None:
    for shape in ((0, 5), (5, 0)):
        assert displacement(Kron(16, SEED), np.ones(16, np.int32), ordinal=0, shape=shape).size == 0
