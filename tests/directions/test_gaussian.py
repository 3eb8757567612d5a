from __future__ import annotations

import numpy as np
import pytest

from fedtune.directions.gaussian import Gaussian
from tests.directions.vectors import SEED


@pytest.mark.parametrize(
    ("ordinal", "block", "expected"),
    [
        (0, 0, [-1, 0, 4, 2, -1, -1, -2, -2, -4, -1, 2, 0, 2, 4, 0, -3]),
        (1, 2, [2, 2, -1, 1, -2, 1, 0, 4, 0, 1, -2, -2, 4, 1, 2, -1]),
    ],
)
def test_the_first_numbers_are_the_expected_ones(ordinal: int, block: int, expected: list[int]) -> None:
    bank = Gaussian(1024, SEED)
    m = bank.direction(3, ordinal=ordinal, shape=(20_000,), blocks=range(block, block + 1))
    assert m[:16].tolist() == expected


def test_numbers_follow_the_binomial_distribution() -> None:
    m = Gaussian(4, SEED).direction(1, ordinal=0, shape=(2**18,), blocks=range(64)).astype(int)
    assert m.min() >= -8
    assert m.max() <= 8
    kurtosis = np.mean((m / 2) ** 4)
    assert kurtosis == pytest.approx(2.875, abs=5 * 9.5 / np.sqrt(2**18))


def test_directions_are_independent() -> None:
    z = [Gaussian(4, SEED).direction(k, ordinal=0, shape=(2**16,), blocks=range(16)) / 2 for k in range(4)]
    np.testing.assert_allclose(np.corrcoef(z), np.eye(4), atol=5 / 256)
