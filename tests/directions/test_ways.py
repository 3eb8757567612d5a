from __future__ import annotations

import numpy as np
import pytest

from fedtune.directions.bank import DirectionBank, displacement
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.rebuild_numpy import rebuild
from fedtune.directions.ways import displacement_for, fastest
from tests.directions.vectors import SEED, accumulators

BANKS: list[DirectionBank] = [Hadamard(16, SEED), Gaussian(16, SEED), Kron(16, SEED)]


def test_the_fastest_way_is_numbas_where_it_is_installed() -> None:
    pytest.importorskip("numba")
    from fedtune.directions import rebuild_numba

    assert fastest() is rebuild_numba.rebuild


def test_without_numba_it_is_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fastest() is rebuild


@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: bank.name)
def test_the_way_to_displacements_gives_the_bits_of_the_reference(bank: DirectionBank) -> None:
    sums = accumulators(bank, most=9000)
    for shape, blocks in (((5,), None), ((3, 4100), None), ((3, 4100), range(1, 2)), ((3, 4100), range(3, 4))):
        found = displacement_for(bank)(bank, sums, ordinal=3, shape=shape, blocks=blocks)
        assert found.dtype == np.int32
        np.testing.assert_array_equal(found, displacement(bank, sums, ordinal=3, shape=shape, blocks=blocks))


def test_numba_is_compiled_only_for_the_bank_that_draws_for_each_direction() -> None:
    pytest.importorskip("numba")
    from fedtune.directions import rebuild_numba

    ways = {bank.name: displacement_for(bank) for bank in BANKS}
    assert ways == {"hadamard": displacement, "gaussian": rebuild_numba.displacement, "kron": displacement}


@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: bank.name)
def test_without_numba_displacements_come_from_the_reference(
    bank: DirectionBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert displacement_for(bank) is displacement
