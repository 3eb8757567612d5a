"""The blocks of 4096 positions that every tensor is cut into, and digests that tell where two parties differ."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from math import prod

import numpy as np

from fedtune.directions.philox import Purpose, words
from fedtune.tensors import Array

BLOCK = 4096
"""Positions of a block; each tensor starts a new one, and its last one may be filled in part."""


def num_blocks(shape: Sequence[int]) -> int:
    """Return how many blocks a tensor has."""
    return -(-prod(shape) // BLOCK)


def positions(blocks: range, shape: Sequence[int]) -> range:
    """Return the flat positions of a run of blocks that exist in the tensor."""
    return range(blocks.start * BLOCK, min(blocks.stop * BLOCK, prod(shape)))


def whole(shape: Sequence[int]) -> range:
    """Return all blocks of a tensor."""
    return range(num_blocks(shape))


def runs(blocks: range, length: int) -> Sequence[range]:
    """Return consecutive runs of at most so many blocks."""
    return [range(start, min(start + length, blocks.stop)) for start in range(blocks.start, blocks.stop, length)]


def block_digests(array: Array, *, run: int = 1) -> tuple[bytes, ...]:
    """Return the SHA-256 of each run of blocks of an array: of displacements (int32) or of rebuilt weights.

    Taken are the bytes of the real positions in row-major order, as they lie in a little-endian machine's memory.
    """
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    step = run * BLOCK * array.itemsize
    return tuple(hashlib.sha256(flat[start : start + step].data).digest() for start in range(0, len(flat), step))


def first_difference(ours: Sequence[bytes], theirs: Sequence[bytes]) -> int | None:
    """Return the number of the first run whose digests differ, None if all agree; a missing run differs."""
    return next((i for i, (a, b) in enumerate(zip_longest(ours, theirs)) if a != b), None)


def sample_blocks(key: int, sizes: Mapping[int, int], count: int) -> Sequence[tuple[int, int]]:
    """Return (ordinal, block) of the blocks that a rebuild check compares, drawn with replacement.

    Args:
        key: `derive(seed, "fedkseed.check", round)`.
        sizes: number of blocks of each trainable tensor, by ordinal.
        count: how many to draw.
    """
    ordinals = sorted(sizes)
    ends = np.cumsum([sizes[ordinal] for ordinal in ordinals], dtype=np.uint64)
    stream = words(key, Purpose.IDS, calls=-(-count // 4))[0, :count].astype(np.uint64)
    drawn = (stream * ends[-1]) >> np.uint64(32)
    tensors = np.searchsorted(ends, drawn, side="right")
    return [
        (ordinals[tensor], int(block) - int(ends[tensor]) + sizes[ordinals[tensor]])
        for tensor, block in zip(tensors.tolist(), drawn.tolist(), strict=True)
    ]
