from __future__ import annotations

import numpy as np
import pytest

from fedtune.directions.blocks import absolute_sum, all_blocks, num_blocks, positions, split_runs


@pytest.mark.parametrize(
    ("shape", "expected"), [((), 1), ((0, 7), 0), ((4096,), 1), ((4097,), 2), ((64, 64), 1), ((3, 5, 1000), 4)]
)
def test_the_last_block_of_a_tensor_may_be_filled_in_part(shape: tuple[int, ...], expected: int) -> None:
    assert num_blocks(shape) == expected
    assert positions(all_blocks(shape), shape) == range(int(np.prod(shape)))


def test_runs_cover_all_blocks_once() -> None:
    assert split_runs(range(2, 9), 3) == [range(2, 5), range(5, 8), range(8, 9)]


def test_a_sum_of_magnitudes_does_not_wrap() -> None:
    assert absolute_sum(np.array([-(2**31), 2**31 - 1, -1], np.int32)) == 2**32
