"""The bank for edge devices: outer products of signs, so that the whole change of a matrix is an adapter of rank p."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import numpy as np

from fedtune.directions.blocks import BLOCK, FP32_LIMIT, absolute_sum, check_size, places_of, positions
from fedtune.directions.hadamard import Hadamard, fwht, sign_halves, signs
from fedtune.directions.philox import Purpose, check_key
from fedtune.errors import ConfigError, Fault
from fedtune.tensors import Array

PIECE = 2**20
"""Positions computed together: 4 MiB of float32."""


@dataclass(frozen=True)
class Kron:
    """Directions of a matrix (R, C) as outer products: K = p * p, z_k = u_i v_j^T with k = i * p + j.

    U is (p, R), V is (p, C), and y = U^T M V with M = A as (p, p). A vector or a number has the directions of the
    hadamard bank.
    """

    size: int
    key: int
    name: ClassVar[str] = "kron"
    code: ClassVar[int] = 3
    halvings: ClassVar[int] = 0
    max_abs: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_size(self.size, self.name, power=4)
        check_key(self.key)

    @property
    def rank(self) -> int:
        """p, the square root of K."""
        return isqrt(self.size)

    @property
    def vectors(self) -> Hadamard:
        """The bank that one-dimensional tensors take their directions from."""
        return Hadamard(self.size, self.key)

    def factors(self, ordinal: int, shape: Sequence[int]) -> tuple[Array, Array]:
        """Return U (p, R) and V (p, C) of a matrix, int8.

        Raises:
            ConfigError: if the tensor has three dimensions or more.
        """
        check_shape(shape)
        rows, columns = shape
        u = sign_rows(self.key, Purpose.ROW_SIGNS, self.rank, rows, ordinal)
        return u, sign_rows(self.key, Purpose.COLUMN_SIGNS, self.rank, columns, ordinal)

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
        if len(shape) < 2:
            yield from self.vectors.pieces(accumulators, ordinal=ordinal, shape=shape, blocks=blocks)
            return
        u, v = self.factors(ordinal, shape)
        # With signs alone |y| and all partial sums are at most sum |A|. Sums of integers below the format's limit are
        # exact in whatever order a matrix product adds them up.
        exact = np.float32 if absolute_sum(accumulators) < FP32_LIMIT else np.float64
        small = accumulators.reshape(self.rank, self.rank).astype(exact) @ v.astype(exact)  # (p, C)
        columns, real = max(1, shape[1]), positions(blocks, shape)
        step = max(1, PIECE // columns)
        for row in range(real.start // columns, -(-real.stop // columns), step):
            y = (u[:, row : row + step].T.astype(exact) @ small).astype(np.int32).reshape(-1)
            # A run of blocks may start and end within a row.
            first = row * columns
            yield y[max(0, real.start - first) : max(0, real.stop - first)]

    def direction(self, index: int, *, ordinal: int, shape: Sequence[int], blocks: range) -> Array:
        """See `DirectionBank.direction`."""
        if len(shape) < 2:
            return self.vectors.direction(index, ordinal=ordinal, shape=shape, blocks=blocks)
        check_shape(shape)
        i, j = divmod(index, self.rank)
        row, column = (
            signs(self.key, purpose, self.rank, number, range(-(-length // BLOCK)), ordinal).reshape(-1)[:length]
            for purpose, number, length in (
                (Purpose.ROW_SIGNS, i, shape[0]),
                (Purpose.COLUMN_SIGNS, j, shape[1]),
            )
        )
        real = positions(blocks, shape)
        return np.outer(row, column).reshape(-1)[real.start : real.stop]


def change_factors(
    bank: Kron, accumulators: Array, *, ordinal: int, shape: Sequence[int], exponent: int, transposed: bool = False
) -> tuple[Array, Array]:
    """Return the change of a matrix as factors a (p, in) and b (out, p), float32, whose product b a it is.

    W - u U^T M V is b = -u U^T M and a = V; where a layer holds its weight as (in, out), as GPT-2's do, b = -u (M V)^T
    and a = U. Exact in float32 as long as sum |A| is below 2^24.
    """
    M = accumulators.reshape(bank.rank, bank.rank).astype(np.float64)  # (p, p)
    U, V = (side.astype(np.float64) for side in bank.factors(ordinal, shape))  # (p, R) and (p, C)
    b, a = ((M @ V).T, U) if transposed else (U.T @ M, V)
    return a.astype(np.float32), (-np.float64(2.0**-exponent) * b).astype(np.float32)


def check_shape(shape: Sequence[int]) -> None:
    """Raise ConfigError unless a tensor is a matrix."""
    if len(shape) != 2:
        raise ConfigError(
            Fault("bank", "tensors of at most two dimensions for 'kron'", f"shape {tuple(shape)}", "use 'hadamard'")
        )


def sign_rows(key: int, purpose: Purpose, size: int, length: int, ordinal: int) -> Array:
    """Return the signs of all directions 0..size-1 over positions 0..length-1, int8 (size, length)."""
    first, second = sign_halves(key, purpose, range(-(-length // BLOCK)), ordinal)
    # The transform of e_k * sgn(d1) is the row k of the Walsh matrix, for all groups of `size` positions at once.
    groups = first.reshape(-1, size)  # (groups, size)
    rows = fwht(np.eye(size, dtype=np.int8))[:, None] * groups.T[:, :, None]  # (k, groups, j)
    return np.asarray(rows.reshape(size, -1)[:, :length] * second.reshape(-1)[:length], np.int8)
