"""The default bank: signs from a randomised Walsh-Hadamard transform, all K directions of a block in one transform.

    sign bit (k, j) = d1[(j & ~(K-1)) | k]  ^  (popcount(k & j) & 1)  ^  d2[j]          sign = 1 - 2 * bit

with two random bits d1 and d2 per position j of a block. Each direction alone is a vector of independent fair signs;
two directions are orthogonal over any range that is a multiple of K and starts on one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.directions.blocks import BLOCK, absolute_sum, check_size, places_of, positions, split_runs
from fedtune.directions.philox import Purpose, check_key, words
from fedtune.tensors import Array

RUN = 32
"""Blocks transformed together: 32 * 4096 numbers of int32 are 512 KiB, which stay in a core's cache."""
SIGN_WORDS = 2 * BLOCK // 32
"""Random words of a block: 128 are the bits d1, 128 are d2."""


@dataclass(frozen=True)
class Hadamard:
    """Directions of random signs; per group of K positions y = sgn(d2) * FWHT(A * sgn(d1)). Any tensor shape."""

    size: int
    key: int
    name: ClassVar[str] = "hadamard"
    code: ClassVar[int] = 2
    halvings: ClassVar[int] = 0
    max_abs: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_size(self.size, self.name)
        check_key(self.key)

    @property
    def seeds(self) -> int:
        """See `DirectionBank.seeds`."""
        return self.size

    @property
    def newest(self) -> slice:
        """See `DirectionBank.newest`."""
        return slice(0, self.size)

    def places(self, seed: int) -> range:
        """See `DirectionBank.places`."""
        return places_of(seed, self.size)

    def span(self, accumulators: Array) -> int:
        """See `DirectionBank.span`."""
        return absolute_sum(accumulators)

    def pieces(self, accumulators: Array, *, ordinal: int, shape: Sequence[int], blocks: range) -> Iterator[Array]:
        """See `DirectionBank.pieces`."""
        table = np.atleast_2d(accumulators)  # (groups, K)
        for run in split_runs(blocks, RUN):
            first, second = sign_halves(self.key, Purpose.DENSE_SIGNS, run, ordinal)
            rows = table[np.arange(run.start, run.stop) % len(table)]  # (blocks, K)
            x = rows[:, None] * first.reshape(len(run), -1, self.size)  # (blocks, 4096 / K, K)
            y = fwht(x).reshape(-1, BLOCK) * second
            yield y.reshape(-1)[: len(positions(run, shape))]

    def direction(self, index: int, *, ordinal: int, shape: Sequence[int], blocks: range) -> Array:
        """See `DirectionBank.direction`."""
        drawn = signs(self.key, Purpose.DENSE_SIGNS, self.size, index, blocks, ordinal)
        return drawn.reshape(-1)[: len(positions(blocks, shape))]


def sign_words(key: int, purpose: Purpose, blocks: range, ordinal: int) -> Array:
    """Return the random words of blocks of signs, uint32 (blocks, 256)."""
    return words(key, purpose, calls=SIGN_WORDS // 4, blocks=blocks, ordinal=ordinal)


def unpack_bits(drawn: Array) -> Array:
    """Return the bits of words, lowest first: uint8 (..., 32 * words)."""
    # "<u4" makes the bytes little-endian on any machine, or bits would come in another order on a big-endian one.
    return np.unpackbits(drawn.astype("<u4").view(np.uint8), axis=-1, bitorder="little")


def sign_halves(key: int, purpose: Purpose, blocks: range, ordinal: int) -> tuple[Array, Array]:
    """Return the signs of d1 and of d2, int8 (blocks, 4096) for both."""
    drawn = (1 - 2 * unpack_bits(sign_words(key, purpose, blocks, ordinal)).astype(np.int8)).astype(np.int8)
    return drawn[:, :BLOCK], drawn[:, BLOCK:]


def walsh(size: int) -> Array:
    """Return the Walsh matrix H (size, size) in Sylvester's order, int8: H[k, j] = (-1)^popcount(k & j)."""
    rows = np.ones((1, 1), np.int8)
    while len(rows) < size:
        rows = np.block([[rows, rows], [rows, -rows]])
    return rows


def walsh_words(size: int, index: int) -> Array:
    """Return the bits popcount(k & j) & 1 of one direction over a block, uint32 (128,), lowest first."""
    odd = np.bitwise_count(np.arange(BLOCK) & (size - 1) & index) & 1
    return np.packbits(odd, bitorder="little").view("<u4").astype(np.uint32)


def signs(key: int, purpose: Purpose, size: int, direction: int, blocks: range, ordinal: int) -> Array:
    """Return the signs of one direction, int8 (blocks, 4096), straight from the formula of this module."""
    first, second = sign_halves(key, purpose, blocks, ordinal)
    place = np.arange(BLOCK)
    row = 1 - 2 * (np.bitwise_count(place & direction) & 1).astype(np.int8)
    return np.asarray(first[:, (place & ~(size - 1)) | direction] * row * second, np.int8)


def fwht(x: Array) -> Array:
    """Return X[..., j] = sum_k (-1)^popcount(k & j) x[..., k]: the Walsh-Hadamard transform in natural order.

    The last axis is a power of two. Integers stay integers; no intermediate exceeds the sum of magnitudes of a row.
    """
    size, width = x.shape[-1], 1
    rows = np.ascontiguousarray(x.reshape(-1, size).T)  # (K, groups): every sum is over long runs of memory
    other = np.empty_like(rows)
    while width < size:
        old, new = (side.reshape(size // (2 * width), 2, -1) for side in (rows, other))
        np.add(old[:, 0], old[:, 1], out=new[:, 0])
        np.subtract(old[:, 0], old[:, 1], out=new[:, 1])
        rows, other, width = other, rows, 2 * width
    return rows.T.reshape(x.shape)
