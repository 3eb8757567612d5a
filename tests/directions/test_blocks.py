from __future__ import annotations

import hashlib

import numpy as np
import pytest

from fedtune.directions.bank import displacement
from fedtune.directions.blocks import block_digests, first_difference, num_blocks, positions, runs, sample_blocks, whole
from fedtune.directions.hadamard import Hadamard
from tests.directions.vectors import SEED, accumulators


@pytest.mark.parametrize(
    ("shape", "expected"), [((), 1), ((0, 7), 0), ((4096,), 1), ((4097,), 2), ((64, 64), 1), ((3, 5, 1000), 4)]
)
def test_the_last_block_of_a_tensor_may_be_filled_in_part(shape: tuple[int, ...], expected: int) -> None:
    assert num_blocks(shape) == expected
    assert positions(whole(shape), shape) == range(int(np.prod(shape)))


def test_runs_cover_all_blocks_once() -> None:
    assert runs(range(2, 9), 3) == [range(2, 5), range(5, 8), range(8, 9)]


def test_digests_name_the_wrong_block_and_the_missing_one() -> None:
    y = displacement(Hadamard(64, SEED), accumulators(Hadamard(64, SEED), most=9), ordinal=0, shape=(20_000,))
    wrong = y.copy()
    wrong[3 * 4096 + 17] += 1
    assert first_difference(block_digests(y), block_digests(wrong)) == 3
    assert first_difference(block_digests(y, run=2), block_digests(wrong, run=2)) == 1
    assert first_difference(block_digests(y), block_digests(y)) is None
    assert first_difference(block_digests(y), block_digests(y[:4096])) == 1


def test_a_block_digest_is_taken_over_the_real_positions_only() -> None:
    y = np.arange(5000, dtype=np.int32)
    assert block_digests(y)[1] == hashlib.sha256(y[4096:].astype("<i4").tobytes()).digest()


def test_a_digest_of_one_block_needs_no_other_block() -> None:
    bank, shape = Hadamard(64, SEED), (5, 4000)
    sums = accumulators(bank, most=9)
    alone = displacement(bank, sums, ordinal=4, shape=shape, blocks=range(4, 5))
    assert len(alone) == 20_000 - 4 * 4096
    assert block_digests(alone) == block_digests(displacement(bank, sums, ordinal=4, shape=shape))[4:]


def test_checked_blocks_are_drawn_from_the_trainable_tensors_alone() -> None:
    drawn = sample_blocks(7, {3: 2, 11: 5, 40: 1}, 400)
    assert set(drawn) == {(3, 0), (3, 1), *((11, block) for block in range(5)), (40, 0)}
    assert drawn[:5] == sample_blocks(7, {40: 1, 11: 5, 3: 2}, 5)
    assert drawn != sample_blocks(8, {3: 2, 11: 5, 40: 1}, 400)
