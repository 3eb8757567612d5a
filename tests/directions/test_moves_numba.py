from __future__ import annotations

import numpy as np
import pytest

from fedtune.directions.bank import displacement, perturb
from fedtune.directions.blocks import BLOCK, num_blocks
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.rebuild_numpy import rebuild as reference
from fedtune.directions.rebuild_numpy import unit_scale
from fedtune.errors import ShapeError
from fedtune.tensors import DTYPES, Array
from tests.directions.vectors import SEED, accumulators, sha, weights

pytest.importorskip("numba")

from fedtune.directions import moves_numba

SHAPES = {2: (1,), 5: (17, 241), 11: (3, 4096), 12: (0, 4)}
"""By ordinal: one position, a block and one position behind it, whole blocks, nothing."""
EXPONENT = 24


def trios(dtype: str, into: str | None = None) -> list[tuple[int, Array, Array]]:
    return [
        (ordinal, weights(shape, dtype, key=ordinal), np.full(shape, 7, DTYPES[into or dtype]))
        for ordinal, shape in SHAPES.items()
    ]


def mover(
    tensors: list[tuple[int, Array, Array]], sums: Array, bank: Hadamard | Gaussian, threads: int = 1
) -> moves_numba.Mover:
    def whole(ordinal: int, old: Array) -> Array:
        return displacement(bank, sums, ordinal=ordinal, shape=(num_blocks(old.shape) * BLOCK,))

    stored = [(ordinal, old, new, whole(ordinal, old)) for ordinal, old, new in tensors]
    return moves_numba.mover(stored, bank=bank, unit=unit_scale(bank, EXPONENT), threads=threads)


def check_walk(bank: Hadamard | Gaussian, dtype: str, into: str | None = None, *, threads: int = 1) -> None:
    """Hold what is written on a walk of several moves against the reference at the same accumulators."""
    sums, tensors, last = accumulators(bank, most=3000), trios(dtype, into), bank.size - 1
    move = mover(tensors, sums, bank, threads)
    walk = [
        ([], (0, 0)),
        ([], (last, -33_554)),
        ([], (last, 33_554)),
        ([(last, 16)], (last // 2, -33_554)),
        ([(last // 3, -2032), (0, 1), (last // 3, 5)], (0, 0)),
    ]
    for moves, beside in walk:
        move(moves, beside)
        for step in moves:
            sums = perturb(bank, sums, *step)
        there = perturb(bank, sums, *beside)
        for ordinal, old, new in tensors:
            expected = np.empty_like(new)
            reference(old, there, bank=bank, ordinal=ordinal, exponent=EXPONENT, out=expected)
            assert sha(new) == sha(expected), (bank, old.shape, moves, beside)


@pytest.mark.parametrize("size", [1, 2, 8, 16, 32, 64, 256, 4096])
def test_every_move_of_the_hadamard_bank_gives_the_bits_of_the_reference(size: int) -> None:
    check_walk(Hadamard(size, SEED), "fp32")


@pytest.mark.parametrize("bank", [Hadamard(256, SEED), Gaussian(16, SEED)], ids=lambda bank: bank.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_format_gives_the_bits_of_the_reference(bank: Hadamard | Gaussian, dtype: str) -> None:
    check_walk(bank, dtype)


@pytest.mark.parametrize(("dtype", "into"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "fp32")])
def test_a_model_is_written_in_another_format(dtype: str, into: str) -> None:
    check_walk(Hadamard(256, SEED), dtype, into)


@pytest.mark.parametrize("threads", [2, 8])
def test_the_number_of_threads_changes_no_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves_numba, "THREAD_RUN", 2)  # a tensor of three blocks is shared
    check_walk(Hadamard(256, SEED), "fp32", threads=threads)


def test_the_walk_sees_a_sign_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would see: signs without the random bits of a group."""
    monkeypatch.setattr(moves_numba, "walsh_words", lambda size, index: np.zeros(128, np.uint32))
    with pytest.raises(AssertionError):
        check_walk(Hadamard(256, SEED), "fp32")


def test_displacements_beyond_24_bits_are_rounded_like_the_reference_s() -> None:
    bank, shape = Hadamard(16, SEED), (40, 250)
    old, new, sums = weights(shape), np.empty(shape, np.float32), np.full(16, 2**26, np.int32)
    mover([(3, old, new)], sums, bank)([(3, 2**25 + 1)], (9, -(2**24) - 3))
    there = perturb(bank, perturb(bank, sums, 3, 2**25 + 1), 9, -(2**24) - 3)
    assert sha(new) == sha(reference(old, there, bank=bank, ordinal=3, exponent=EXPONENT))


def test_numbers_that_no_displacement_moves_keep_every_bit() -> None:
    old = np.array([0.0, -0.0, 1e-40, np.finfo(np.float32).max] * 1024, np.float32).reshape(64, 64)
    new = np.ones_like(old)
    mover([(0, old, new)], np.zeros(16, np.int32), Hadamard(16, SEED))([], (0, 0))
    assert sha(new) == sha(old)


def test_a_tensor_that_is_not_contiguous_is_read_in_row_major_order() -> None:
    bank, sums = Hadamard(16, SEED), accumulators(Hadamard(16, SEED), most=99)
    old, new = weights((30, 200)).T, np.empty((200, 30), np.float32)
    mover([(1, old, new)], sums, bank)([], (2, 7))
    assert sha(new) == sha(reference(old, perturb(bank, sums, 2, 7), bank=bank, ordinal=1, exponent=EXPONENT))


def test_a_result_of_another_shape_is_refused() -> None:
    old, new = weights((3, 5)), np.empty((5, 3), np.float32)
    with pytest.raises(ShapeError, match=r"contiguous result of shape \(3, 5\); got \(5, 3\)"):
        mover([(1, old, new)], np.zeros(16, np.int32), Hadamard(16, SEED))
