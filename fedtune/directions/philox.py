"""Philox4x32-10, the counter-based generator of all directions and seed ids: integers only, the same everywhere."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from fedtune.tensors import Array

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Purpose(IntEnum):
    """What a word stream is for: the low byte of the counter's third word."""

    DENSE_SIGNS = 1
    ROW_SIGNS = 2
    COLUMN_SIGNS = 3
    GAUSSIAN = 4
    IDS = 5
    DISTINCT_IDS = 6


def philox(counter: tuple[Any, Any, Any, Any], key: int) -> tuple[Any, Any, Any, Any]:
    """Return four words for each counter (Salmon et al., SC'11, "Parallel random numbers: as easy as 1, 2, 3").

    A counter's words are integers below 2^32 in arrays of 64 bits that broadcast: numpy's uint64 or torch's int64.
    The text is the same for both, because the low 64 bits of a product do not depend on the sign.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & MASK, key >> 32
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        # The mask after the shift drops the copies of the sign bit that torch's signed shift brings in.
        c0, c1, c2, c3 = ((p1 >> 32) & MASK) ^ c1 ^ k0, p1 & MASK, ((p0 >> 32) & MASK) ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + INCREMENTS[0]) & MASK, (k1 + INCREMENTS[1]) & MASK
    return c0, c1, c2, c3


def words(
    key: int, purpose: Purpose, *, calls: int, blocks: range = range(1), direction: int = 0, ordinal: int = 0
) -> Array:
    """Return the start of each block's word stream, uint32 (blocks, 4 * calls).

    Word n of a stream is word n mod 4 of call n // 4.
    """
    call = np.arange(calls, dtype=np.uint64)
    block = np.arange(blocks.start, blocks.stop, dtype=np.uint64)[:, None]
    third, fourth = np.uint64(purpose | direction << 8), np.uint64(ordinal)
    drawn = philox((call, block, np.full((1, calls), third), fourth), key)
    return np.stack([np.broadcast_to(word, (len(blocks), calls)).astype(np.uint32) for word in drawn], axis=-1).reshape(
        len(blocks), 4 * calls
    )
