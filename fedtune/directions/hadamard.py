"""The default bank: signs from a randomised Walsh-Hadamard transform, all K directions of a block in one transform."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fedtune.directions.bank import check_key, check_size
from fedtune.directions.blocks import BLOCK, positions, runs, whole
from fedtune.directions.philox import Purpose
from fedtune.directions.signs import halves, signs
from fedtune.errors import ShapeError
from fedtune.tensors import Array

RUN = 32
"""Blocks transformed together: 512 KiB of int32 stay in a core's cache."""


@dataclass(frozen=True)
class Hadamard:
    """z_k = the sign block's signs; per group of K positions y = sgn(d2) * FWHT(A * sgn(d1)). Any tensor shape."""

    size: int
    key: int
    name: ClassVar[str] = "hadamard"
    code: ClassVar[int] = 2
    halvings: ClassVar[int] = 0
    reach: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check_size(self.size, self.name)
        check_key(self.key)

    def pieces(self, accumulators: Array, *, ordinal: int, shape: Sequence[int], blocks: range) -> Iterator[Array]:
        """See `DirectionBank.pieces`."""
        for run in runs(blocks, RUN):
            first, second = halves(self.key, Purpose.DENSE_SIGNS, run, ordinal)
            x = accumulators * first.reshape(-1, self.size)  # (groups, K)
            y = fwht(x).reshape(-1, BLOCK) * second
            yield y.reshape(-1)[: len(positions(run, shape))]

    def direction(self, index: int, *, ordinal: int, shape: Sequence[int], blocks: range) -> Array:
        """See `DirectionBank.direction`."""
        drawn = signs(self.key, Purpose.DENSE_SIGNS, self.size, index, blocks, ordinal)
        return drawn.reshape(-1)[: len(positions(blocks, shape))]

    def projection(self, tensor: Array, *, ordinal: int) -> Array:
        """Return the inner products of a tensor with all K directions, float64 (K,); summed block after block.

        Raises:
            ShapeError: if the tensor does not consist of floats.
        """
        if tensor.dtype.kind not in "fV":  # ml_dtypes' bfloat16 is of kind V
            raise ShapeError(f"expected a tensor of floats to project; got {tensor.dtype}")
        flat, products = tensor.reshape(-1), np.zeros(self.size)
        for run in runs(whole(tensor.shape), RUN):
            first, second = halves(self.key, Purpose.DENSE_SIGNS, run, ordinal)
            d = np.zeros(len(run) * BLOCK)
            real = positions(run, tensor.shape)
            d[: len(real)] = flat[real.start : real.stop]
            x = fwht((d.reshape(-1, BLOCK) * second).reshape(-1, self.size))
            products += (first.reshape(-1, self.size) * x).sum(0)
        return products


def fwht(x: Array) -> Array:
    """Return X[..., j] = sum_k (-1)^popcount(k & j) x[..., k]: the Walsh-Hadamard transform in natural order.

    The last axis is a power of two. Integers stay integers; no intermediate exceeds the sum of magnitudes of a row.
    """
    size, width = x.shape[-1], 1
    rows = np.ascontiguousarray(x.reshape(-1, size).T)  # (K, groups): every sum is over long runs of memory
    other = np.empty_like(rows)
    while width < size:
        old, new = (each.reshape(size // (2 * width), 2, -1) for each in (rows, other))
        np.add(old[:, 0], old[:, 1], out=new[:, 0])
        np.subtract(old[:, 0], old[:, 1], out=new[:, 1])
        rows, other, width = other, rows, 2 * width
    return rows.T.reshape(x.shape)
