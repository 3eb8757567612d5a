"""Inner products of a tensor with all directions of the newest bank at once: the reference, with numpy.

It is a rebuild's map transposed: where a rebuild adds up sum_k A_k z_k, this returns <values, z_k> for every k. Of a
gradient it gives the slopes along all K directions of every group, by one transform for each K weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtune.directions.bank import DirectionBank
from fedtune.directions.blocks import BLOCK, num_blocks
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard, fwht, sign_halves
from fedtune.directions.kron import Kron
from fedtune.directions.philox import Purpose
from fedtune.directions.space import Grouped, group_of, plain_banks
from fedtune.errors import ShapeError
from fedtune.tensors import Array


def project(bank: DirectionBank, values: Array, ordinal: int, shape: Sequence[int]) -> Array:
    """Return <values, z_k> for every number of the newest bank, float64 (groups x K,); zero for other tensors' groups.

    Floats: every way gives nearly the same numbers, none promises the same bits.

    Args:
        bank: the directions.
        values: of the tensor, in any number format; their products are summed in float64.
        ordinal: the tensor's place in the manifest.
        shape: of the tensor.

    Raises:
        ConfigError: if the bank has no directions for this tensor.
        ShapeError: if the values are not as many as the shape has.
    """
    if values.size != int(np.prod(shape)):
        raise ShapeError(
            f"projection: expected values of shape {tuple(shape)}; got {values.shape}; pass the tensor's own"
        )
    flat = np.ascontiguousarray(values).reshape(-1).astype(np.float64)
    rows = block_rows(bank)
    return place_rows(bank, project_rows(plain_banks(bank)[-1], flat, rows, ordinal, shape), ordinal)


def block_rows(bank: DirectionBank) -> int:
    """Return G of the groups by blocks; 1 for a bank of one group and where every tensor is a group."""
    return bank.groups if isinstance(bank, Grouped) and bank.groups != "tensor" else 1


def place_rows(bank: DirectionBank, rows: Array, ordinal: int) -> Array:
    """Return what one tensor gives, (rows, K), at its place among the numbers of all groups, (groups x K,)."""
    if not isinstance(bank, Grouped) or bank.groups != "tensor":
        return rows.reshape(-1)
    numbers = np.zeros((bank.num_groups, bank.seeds), np.float64)
    numbers[group_of(bank, ordinal)] = rows[0]
    return numbers.reshape(-1)


def project_rows(bank: DirectionBank, flat: Array, rows: int, ordinal: int, shape: Sequence[int]) -> Array:
    """Return the inner products with the directions of a plain bank, float64 (rows, K): block b adds to b mod rows."""
    if isinstance(bank, Kron) and len(shape) > 1:
        u, v = (side.astype(np.float64) for side in bank.factors(ordinal, shape))
        return np.asarray((u @ flat.reshape(shape) @ v.T).reshape(1, -1))
    dense = bank.vectors if isinstance(bank, Kron) else bank
    sums = np.zeros((rows, bank.seeds), np.float64)
    for number in range(num_blocks(shape)):
        part = np.zeros(BLOCK)
        real = flat[number * BLOCK : (number + 1) * BLOCK]
        part[: len(real)] = real
        if isinstance(dense, Hadamard):
            first, second = sign_halves(dense.key, Purpose.DENSE_SIGNS, range(number, number + 1), ordinal)
            turned = fwht((part * second).reshape(-1, dense.size))  # (4096 / K, K)
            sums[number % rows] += (turned * first.reshape(-1, dense.size)).sum(axis=0)
        else:
            assert isinstance(dense, Gaussian)
            for k in range(dense.size):
                m = dense.direction(k, ordinal=ordinal, shape=shape, blocks=range(number, number + 1))
                sums[number % rows, k] += (m @ real) / 2**dense.halvings
    return sums
