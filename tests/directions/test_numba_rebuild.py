from __future__ import annotations

import importlib
import sys

import numpy as np
import pytest

from fedtune.directions.bank import DirectionBank, displacement
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.errors import ExtraError
from fedtune.tensors import DTYPES
from tests.directions.vectors import (
    BANKS,
    SEED,
    accumulators,
    check_against_reference,
    check_no_displacement,
    check_vectors,
    sha,
    weights,
)

pytest.importorskip("numba")

from fedtune.directions import numba_rebuild
from fedtune.directions.numba_rebuild import rebuild


def test_the_expected_weights_are_rebuilt() -> None:
    check_vectors(rebuild)


@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: f"{bank.name}-{bank.size}")
def test_every_size_gives_the_bits_of_the_reference(bank: DirectionBank) -> None:
    check_against_reference(rebuild, bank, most=3000, dtypes=("bf16",))


@pytest.mark.parametrize("bank", [Hadamard(256, SEED), Kron(256, SEED)], ids=lambda bank: bank.name)
def test_every_format_gives_the_bits_of_the_reference(bank: DirectionBank) -> None:
    check_against_reference(rebuild, bank, most=3000, dtypes=("fp32", "fp16", "bf16"))


def test_sums_close_to_32_bits_give_the_bits_of_the_reference() -> None:
    check_against_reference(rebuild, Hadamard(256, SEED), most=2**22, dtypes=("fp32",))
    check_against_reference(rebuild, Gaussian(16, SEED), most=2**24 - 1, dtypes=("bf16",))


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_displacement_every_bit_of_the_base_comes_back(dtype: str) -> None:
    check_no_displacement(rebuild, dtype)


def test_the_number_of_threads_changes_no_bit() -> None:
    bank, base = Hadamard(256, SEED), weights((11, 3000), "bf16")
    sums = accumulators(bank, most=2000)
    found = {sha(rebuild(base, sums, bank=bank, ordinal=0, exponent=22, threads=threads)) for threads in (1, 2, 8, 100)}
    assert len(found) == 1


def test_a_run_of_blocks_can_be_had_alone() -> None:
    bank = Hadamard(256, SEED)
    sums = accumulators(bank, most=2**22)
    y = numba_rebuild.displacement(bank, sums, ordinal=3, shape=(11, 3000), blocks=range(2, 9), threads=2)
    np.testing.assert_array_equal(y, displacement(bank, sums, ordinal=3, shape=(11, 3000), blocks=range(2, 9)))


def test_an_empty_tensor_stays_empty() -> None:
    bank = Hadamard(256, SEED)
    assert rebuild(weights((0, 4)), accumulators(bank, most=3), bank=bank, ordinal=0, exponent=9).shape == (0, 4)


def test_without_numba_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "fedtune.directions.numba_rebuild")
    with pytest.raises(ExtraError, match=r'pip install "fedtune\[fast\]"'):
        importlib.import_module("fedtune.directions.numba_rebuild")
