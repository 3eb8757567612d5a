"""What a cohort's scalars add to the accumulators: integers from the client's scalar to the weighted mean."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedtune.tensors import Array

MAX_SCALAR = 127
"""Bound of a scalar, which is a signed byte: -128 is none."""
MAX_WEIGHT = 127
"""Of a client."""
MAX_SHIFT = 24
"""A scalar of one never moves an accumulator by more than 2^24."""


def count_scalars(ids: Array, scalars: Array, size: int) -> Array:
    """Return a client's sum of scalars for each of K directions, int64 (K,)."""
    sums = np.zeros(size, np.int64)
    np.add.at(sums, ids, scalars.astype(np.int64))
    return sums


def weighted_sum(parts: Iterable[tuple[Array, int]], size: int) -> tuple[Array, int]:
    """Return (sum of w_i a_i, sum of w_i), exactly: a_i is int64 (K,), w_i a whole number from 1 to 127."""
    sums, total = np.zeros(size, np.int64), 0
    for each, weight in parts:
        sums += weight * each
        total += weight
    return sums, total


def increments(sums: Array, total: int, shift: int) -> Array:
    """Return 2^shift * sums / total to the nearest integer, a tie to the even one, int64 (K,).

    Integers all the way: no order of arrival and no machine can change a bit. The client's own step,
    `A[k] += q * 2^shift`, is the case of one client. A `total` of zero stands for nobody, who adds nothing.
    """
    if total == 0:
        return np.zeros(len(sums), np.int64)
    twice = (sums << (shift + 1)) + total
    quotient, rest = np.divmod(twice, 2 * total)
    return np.asarray(quotient - ((rest == 0) & (quotient & 1 == 1)), np.int64)
