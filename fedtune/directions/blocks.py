"""Blocks of 4096 positions, the unit in which directions are drawn, and the limits within which sums are exact."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Literal, TypeAlias

import numpy as np

from fedtune.errors import ConfigError, Fault
from fedtune.tensors import Array

Groups: TypeAlias = int | Literal["tensor"]
"""Into how many groups the positions are divided, each with K accumulators of its own: block b of a tensor belongs to
group b mod G, G a power of two from 1 to 64; "tensor": all blocks of the n-th tensor that is moved to group n."""
BLOCK = 4096
"""Positions of a block; each tensor starts a new block, and its last block may be partly filled."""
MAX_SIZE = BLOCK
"""Largest K: a group of K positions must not reach over the end of a block."""
INT32_LIMIT = 2**31
FP32_LIMIT = 2**24
"""Below it a sum of integers is exact in float32, in any order."""


def num_blocks(shape: Sequence[int]) -> int:
    """Return how many blocks a tensor has."""
    return -(-prod(shape) // BLOCK)


def positions(blocks: range, shape: Sequence[int]) -> range:
    """Return the flat positions of a run of blocks that exist in the tensor."""
    return range(blocks.start * BLOCK, min(blocks.stop * BLOCK, prod(shape)))


def all_blocks(shape: Sequence[int]) -> range:
    """Return the numbers of all blocks of a tensor."""
    return range(num_blocks(shape))


def split_runs(blocks: range, length: int) -> Sequence[range]:
    """Split a range of blocks into consecutive runs of at most `length` blocks."""
    return [range(start, min(start + length, blocks.stop)) for start in range(blocks.start, blocks.stop, length)]


def absolute_sum(accumulators: Array) -> int:
    """Return sum |A| of integers, exactly."""
    # In 64 bits: the absolute value of -2^31 does not fit into int32.
    return int(np.abs(accumulators.astype(np.int64)).sum())


def places_of(seed: int, seeds: int, *, groups: int = 1, start: int = 0) -> range:
    """Return the places of one seed's accumulators in a vector that has K of them for each group.

    Raises:
        IndexError: if there is no such seed.
    """
    if not 0 <= seed < seeds:
        raise IndexError(f"expected a seed from 0 to {seeds - 1}; got {seed}")
    return range(start + seed, start + groups * seeds, seeds)


def check_size(size: int, name: str, *, power: int = 2) -> None:
    """Raise ConfigError unless K is a power of 2 (of 4 for kron) from 1 to 4096, naming the nearest that is one."""
    legal = [power**n for n in range(13) if power**n <= MAX_SIZE]
    if size not in legal:
        nearest = min(legal, key=lambda candidate: (abs(candidate - size), candidate))
        expected = f"a power of {power} from 1 to {MAX_SIZE} for the bank {name!r}"
        raise ConfigError(Fault("seeds", expected, str(size), f"the nearest is {nearest}"))
