"""Projections on the hadamard bank compiled by numba (the extra `fast`): the compiled rebuild's steps, turned round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
from numba import float32, uint32

from fedtune.directions.blocks import BLOCK, all_blocks, positions, split_runs
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.rebuild_numba import DENSE_SIGNS, SIGN_CALLS, Compiled, compile_nogil, fill_words, fwht
from fedtune.tensors import Array

RUN = 256
"""Blocks whose sums are added up together, whatever the number of threads: that number then changes no bit."""


def project_runs(
    bank: Hadamard,
    values_of: Callable[[range], Array],
    *,
    ordinal: int,
    shape: Sequence[int],
    rows: int = 1,
    threads: int = 1,
) -> Array:
    """Return the inner products of a tensor with all K directions, float64 (rows, K): block b adds to b mod rows.

    Args:
        bank: a plain one.
        values_of: the tensor's values in float32 at a range of flat positions.
        ordinal: the tensor's place in the manifest.
        shape: of the tensor.
        rows: groups of blocks.
        threads: how many share the tensor's runs of blocks.
    """
    loop, key = project_loop(bank.size), np.uint64(bank.key)

    def work(run: range) -> Array:
        sums = np.zeros((rows, bank.size), np.float64)
        loop(values_of(positions(run, shape)), sums, key, np.uint32(ordinal), np.uint32(run.start))
        return sums

    runs, total = split_runs(all_blocks(shape), RUN), np.zeros((rows, bank.size), np.float64)
    if threads == 1 or len(runs) < 2:
        for run in runs:
            total += work(run)
        return total
    with ThreadPoolExecutor(min(threads, len(runs))) as pool:
        for sums in pool.map(work, runs):  # in the order of the runs
            total += sums
    return total


@cache
def project_loop(size: int) -> Compiled:
    """Return the compiled loop over blocks that adds each block's inner products to those of its row."""
    transform = fwht(size)

    @compile_nogil
    def run(values: Any, sums: Any, key: Any, ordinal: Any, first: Any) -> None:
        drawn = np.empty((4, SIGN_CALLS), np.uint32)
        x = np.empty(BLOCK, np.float32)
        bits = x.view(np.uint32)
        for number in range((values.size + BLOCK - 1) // BLOCK):
            block = uint32(first + number)
            row = sums[block % uint32(sums.shape[0])]
            fill_words(drawn, key, uint32(DENSE_SIGNS), block, ordinal)
            start, stop = number * BLOCK, min((number + 1) * BLOCK, values.size)
            for i in range(stop - start):
                x[i] = values[start + i]
            for i in range(stop - start, BLOCK):
                x[i] = float32(0)
            flip_signs(bits, drawn[:, SIGN_CALLS // 2 :])
            transform(x)
            flip_signs(bits, drawn[:, : SIGN_CALLS // 2])
            for group in range(BLOCK // size):
                for k in range(size):
                    row[k] += x[group * size + k]

    return run


@compile_nogil
def flip_signs(bits: Any, drawn: Any) -> None:
    """Flip the sign of every float32, given as its bits, whose bit of the words is set."""
    for n in range(BLOCK // 32):
        word = drawn[n % 4, n // 4]
        for bit in range(32):
            bits[n * 32 + bit] ^= ((word >> uint32(bit)) & uint32(1)) << uint32(31)
