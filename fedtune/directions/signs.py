"""Signs of a block's positions for all directions at once: two random bits per position and a Walsh matrix.

    sign bit (k, j) = d1[(j & ~(K-1)) | k]  ^  (popcount(k & j) & 1)  ^  d2[j]          sign = 1 - 2 * bit

Each direction alone is a vector of independent fair signs; two of them are orthogonal over any range that is a
multiple of K and starts on one.
"""

from __future__ import annotations

import numpy as np

from fedtune.directions.blocks import BLOCK
from fedtune.directions.philox import Purpose, words
from fedtune.tensors import Array

WORDS = 2 * BLOCK // 32
"""Of a block: 128 words are the bits d1, 128 are d2."""


def sign_words(key: int, purpose: Purpose, blocks: range, ordinal: int) -> Array:
    """Return the random words of the sign blocks, uint32 (blocks, 256)."""
    return words(key, purpose, calls=WORDS // 4, blocks=blocks, ordinal=ordinal)


def bits(drawn: Array) -> Array:
    """Return the bits of words, lowest first: uint8 (..., 32 * words)."""
    return np.unpackbits(drawn.astype("<u4").view(np.uint8), axis=-1, bitorder="little")


def halves(key: int, purpose: Purpose, blocks: range, ordinal: int) -> tuple[Array, Array]:
    """Return the signs of d1 and of d2, int8 (blocks, 4096) each."""
    drawn = (1 - 2 * bits(sign_words(key, purpose, blocks, ordinal)).astype(np.int8)).astype(np.int8)
    return drawn[:, :BLOCK], drawn[:, BLOCK:]


def walsh(size: int) -> Array:
    """Return H (size, size) of Sylvester's order, int8: H[k, j] = (-1)^popcount(k & j)."""
    rows = np.ones((1, 1), np.int8)
    while len(rows) < size:
        rows = np.block([[rows, rows], [rows, -rows]])
    return rows


def signs(key: int, purpose: Purpose, size: int, direction: int, blocks: range, ordinal: int) -> Array:
    """Return the signs of one direction, int8 (blocks, 4096), straight from the formula above."""
    first, second = halves(key, purpose, blocks, ordinal)
    place = np.arange(BLOCK)
    row = 1 - 2 * (np.bitwise_count(place & direction) & 1).astype(np.int8)
    return np.asarray(first[:, (place & ~(size - 1)) | direction] * row * second, np.int8)
