"""Philox4x32-10, the counter-based generator of all directions and seed ids: integers only, the same everywhere."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np

from fedtune.errors import ConfigError, Fault
from fedtune.tensors import Array

MASK = 0xFFFFFFFF
# The published constants of Philox4x32-10, as in Random123's philox.h; the key's increments are the golden ratio and
# sqrt(3) - 1 in 32 bits. Any other value gives other directions, and no run could be resumed.
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class Purpose(IntEnum):
    """What a stream of words is used for: the low byte of the counter's third word, so that no two uses overlap."""

    DENSE_SIGNS = 1
    ROW_SIGNS = 2
    COLUMN_SIGNS = 3
    GAUSSIAN = 4
    IDS = 5
    DISTINCT_IDS = 6


def philox(counter: tuple[Any, Any, Any, Any], key: int) -> tuple[Any, Any, Any, Any]:
    """Return four random words for each counter (Salmon et al., SC'11, "Parallel random numbers: as easy as 1, 2, 3").

    A counter's words are integers below 2^32 in arrays of 64 bits that broadcast: numpy's uint64 or torch's int64.
    The code is the same for both, because the low 64 bits of a product do not depend on the sign.
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
    """Return the start of each block's stream of random words, uint32 (blocks, 4 * calls).

    Word n of a stream is word n mod 4 of call n // 4. `direction` and `ordinal` (the tensor's place in the manifest)
    select the stream together with the key, the purpose and the block.
    """
    call = np.arange(calls, dtype=np.uint64)
    block = np.arange(blocks.start, blocks.stop, dtype=np.uint64)[:, None]
    third, fourth = np.uint64(purpose | direction << 8), np.uint64(ordinal)
    streams = philox((call, block, np.full((1, calls), third), fourth), key)
    # The fourth word does not depend on the block, so the four have different shapes until they are broadcast.
    full = [np.broadcast_to(word, (len(blocks), calls)).astype(np.uint32) for word in streams]
    return np.stack(full, axis=-1).reshape(len(blocks), 4 * calls)


def check_key(key: int) -> None:
    """Raise ConfigError unless a key has the generator's 64 bits."""
    if not 0 <= key < 2**64:
        raise ConfigError(Fault("key", "an integer of 64 bits", str(key), "make it with seeds.derive"))
