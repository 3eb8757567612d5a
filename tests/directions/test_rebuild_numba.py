from __future__ import annotations

import importlib
import sys
from functools import partial

import numpy as np
import pytest

from fedtune.directions.bank import DirectionBank, displacement
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.rebuild_numpy import rebuild as reference
from fedtune.directions.space import directions
from fedtune.errors import ExtraError, RoundError, ShapeError
from fedtune.tensors import DTYPES, Array
from tests.directions.vectors import (
    BANKS,
    KEYS,
    SEED,
    SPACE_NAMES,
    SPACES,
    TENSORS,
    accumulators,
    check_against_reference,
    check_no_displacement,
    check_spaces,
    check_vectors,
    sha,
    weights,
)

pytest.importorskip("numba")

from fedtune.directions import rebuild_numba
from fedtune.directions.rebuild_numba import rebuild


def test_the_expected_weights_are_rebuilt() -> None:
    check_vectors(rebuild)


@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: f"{bank.name}-{bank.size}")
def test_every_size_gives_the_bits_of_the_reference(bank: DirectionBank) -> None:
    check_against_reference(rebuild, bank, most=3000, dtypes=("bf16",))


@pytest.mark.parametrize("bank", [Hadamard(256, SEED), Kron(256, SEED)], ids=lambda bank: bank.name)
def test_every_format_gives_the_bits_of_the_reference(bank: DirectionBank) -> None:
    check_against_reference(rebuild, bank, most=3000, dtypes=("fp32", "fp16", "bf16"))


SOME = [
    directions("hadamard", 256, KEYS[:2], 4),
    directions("hadamard", 256, KEYS[:2], "tensor", TENSORS),
    directions("kron", 256, KEYS[:2], "tensor", TENSORS),
    directions("gaussian", 16, KEYS[:2], 2),
]


@pytest.mark.parametrize("bank", SOME, ids=lambda bank: f"{bank.name}-{bank.groups}")
def test_several_banks_and_groups_give_the_bits_of_the_reference(bank: DirectionBank) -> None:
    dtypes = ("bf16",) if bank.name == "gaussian" else ("fp32", "fp16", "bf16")
    check_spaces(rebuild, bank, most=3000, dtypes=dtypes)
    check_spaces(partial(rebuild, threads=3), bank, most=2**16, dtypes=dtypes)
    check_spaces(rewritten, bank, most=3000, dtypes=dtypes)


@pytest.mark.slow
@pytest.mark.parametrize("bank", SPACES, ids=SPACE_NAMES)
def test_many_banks_and_groups_give_the_bits_of_the_reference(bank: DirectionBank) -> None:
    check_spaces(rebuild, bank, most=3000, dtypes=("fp32", "bf16"))
    check_spaces(rewritten, bank, most=3000, dtypes=("fp32", "bf16"))


def rewritten(
    tensor: Array, accumulators: Array, *, bank: DirectionBank, ordinal: int, exponent: int, out: Array | None = None
) -> Array:
    """Rebuild by the function that writes many tensors again and again."""
    new = np.empty_like(tensor)
    write = rebuild_numba.rewriter([(ordinal, tensor, new)], bank=bank, exponent=exponent)
    write(np.zeros_like(accumulators))
    write(accumulators)
    return new


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
    y = rebuild_numba.displacement(bank, sums, ordinal=3, shape=(11, 3000), blocks=range(2, 9), threads=2)
    np.testing.assert_array_equal(y, displacement(bank, sums, ordinal=3, shape=(11, 3000), blocks=range(2, 9)))


def test_an_empty_tensor_stays_empty() -> None:
    bank = Hadamard(256, SEED)
    assert rebuild(weights((0, 4)), accumulators(bank, most=3), bank=bank, ordinal=0, exponent=9).shape == (0, 4)


def test_without_numba_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    monkeypatch.delitem(sys.modules, "fedtune.directions.rebuild_numba")
    with pytest.raises(ExtraError, match=r'pip install "fedtune\[fast\]"'):
        importlib.import_module("fedtune.directions.rebuild_numba")


REWRITTEN = {1: (1,), 15: (3, 5), 4097: (17, 241)}
"""Shapes by size: one position, part of a block, and one block with a single position behind it."""


def trios(dtype: str, into: str | None = None) -> list[tuple[int, Array, Array]]:
    """Return (ordinal, w0, where w(A) is written) of a model of three tensors."""
    return [
        (ordinal, weights(shape, dtype, key=ordinal), np.full(shape, 7, DTYPES[into or dtype]))
        for ordinal, shape in zip((2, 5, 11), REWRITTEN.values(), strict=True)
    ]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bank", [Hadamard(256, SEED), Gaussian(16, SEED), Kron(256, SEED)], ids=lambda bank: bank.name)
def test_a_whole_model_is_rewritten_to_the_bits_of_the_reference(bank: DirectionBank, dtype: str, threads: int) -> None:
    tensors = trios(dtype)
    rewrite = rebuild_numba.rewriter(tensors, bank=bank, exponent=24, threads=threads)
    # Twice, and back to zeros: each time from w0, never from what was written before.
    for sums in (accumulators(bank, most=3000), accumulators(bank, most=2000, key=1), np.zeros(bank.size, np.int32)):
        rewrite(sums)
        for ordinal, old, new in tensors:
            assert sha(new) == sha(reference(old, sums, bank=bank, ordinal=ordinal, exponent=24)), old.shape
    assert [sha(old) for _, old, _ in tensors] == [sha(new) for _, _, new in tensors]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("dtype", "into"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp32")])
def test_a_model_is_rewritten_in_another_format(dtype: str, into: str, threads: int) -> None:
    bank, tensors = Hadamard(256, SEED), trios(dtype, into)
    sums = accumulators(bank, most=3000)
    rebuild_numba.rewriter(tensors, bank=bank, exponent=24, threads=threads)(sums)
    for ordinal, old, new in tensors:
        expected = reference(old, sums, bank=bank, ordinal=ordinal, exponent=24, out=np.empty_like(new))
        assert sha(new) == sha(expected)


def test_a_tensor_that_is_not_contiguous_is_read_in_row_major_order() -> None:
    bank = Hadamard(256, SEED)
    sums, old = accumulators(bank, most=3000), np.asfortranarray(weights((17, 241)))
    new = np.empty((17, 241), np.float32)
    rebuild_numba.rewriter([(4, old, new)], bank=bank, exponent=24)(sums)
    assert sha(new) == sha(reference(np.ascontiguousarray(old), sums, bank=bank, ordinal=4, exponent=24))


def test_a_rewriter_refuses_what_a_rebuild_refuses() -> None:
    bank, old = Hadamard(16, SEED), weights((3, 5))
    with pytest.raises(ShapeError, match="contiguous result of shape"):
        rebuild_numba.rewriter([(0, old, np.empty((5, 3), np.float32))], bank=bank, exponent=24)
    with pytest.raises(ShapeError, match="expected weights in"):
        rebuild_numba.rewriter([(0, old, np.empty((3, 5)))], bank=bank, exponent=24)
    rewrite = rebuild_numba.rewriter([(0, old, np.zeros((3, 5), np.float32))], bank=bank, exponent=24)
    with pytest.raises(ShapeError, match="expected 16 signed integers"):
        rewrite(np.zeros(8, np.int32))
    with pytest.raises(RoundError, match=r"expected sum \|A\| of at most"):
        rewrite(np.full(16, 2**30, np.int32))
