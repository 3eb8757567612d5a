"""Weights beside w(A) compiled by numba: from stored displacements and packed signs, in one pass over the weights.

A rebuild draws the signs of all K directions and transforms them. Here the displacements of A stay in memory, and one
direction, or a few, are added to them: a pass takes about as long as a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, TypeAlias

import numpy as np
from numba import float32, int32, uint16, uint32

from fedtune.directions.blocks import BLOCK, all_blocks, num_blocks, split_runs
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import SIGN_WORDS, Hadamard, walsh_words
from fedtune.directions.philox import Purpose
from fedtune.directions.rebuild_numba import (
    GAUSSIAN_CALLS,
    RUN,
    SIGN_CALLS,
    Compiled,
    add_popcounts,
    as_bits,
    compile_nogil,
    fill_words,
)
from fedtune.directions.rebuild_numpy import prepare_output, round_into
from fedtune.tensors import DTYPES, Array

Move: TypeAlias = tuple[int, int]
Mover: TypeAlias = Callable[[Sequence[Move], Move], None]
"""See `moves_torch`."""

DENSE_SIGNS, GAUSSIAN = int(Purpose.DENSE_SIGNS), int(Purpose.GAUSSIAN)
THREAD_RUN = 64
"""Blocks that a thread takes at a time: 262,144 weights, some hundred microseconds."""
WORDS = BLOCK // 32
"""Words of a bit for each position of a block."""


@dataclass(frozen=True)
class Displaced:
    """A tensor, and what is stored of its displacements."""

    ordinal: int
    shape: Sequence[int]
    old: Array
    """w0, flat."""
    new: Array
    """What is written, flat."""
    y: Array
    """Displacements of A, int32 (blocks * 4096,): all blocks are whole."""
    signs: Array
    """Random bits of the hadamard bank, uint32 (blocks, 256); of other banks one row that is not read."""


@dataclass(frozen=True)
class Order:
    """Directions to add, the last one for this pass alone: seeds, amounts, and their rows of the Walsh matrix."""

    seeds: Array
    """uint32 (moves + 1,)"""
    amounts: Array
    """int32 (moves + 1,)"""
    rows: Array
    """uint32 (moves + 1, 128)"""


def mover(
    tensors: Sequence[tuple[int, Array, Array, Array]],
    *,
    bank: Hadamard | Gaussian,
    unit: np.float32,
    threads: int = 1,
) -> Mover:
    """Return a function (moves, beside) that moves A for good, and writes the weights of A moved by `beside` as well.

    Args:
        tensors: (ordinal, w0, the array that is written to, the displacements of A, int32 in whole blocks).
        bank: the directions that A is moved along.
        unit: 2^-(e + halvings).
        threads: number of threads that share a tensor's blocks.
    """
    parts = [store(bank, *tensor) for tensor in tensors]

    def move(moves: Sequence[Move], beside: Move) -> None:
        order = order_of(bank, [*moves, beside])
        work = partial(write_blocks, bank=bank, order=order, unit=unit)
        if threads == 1:
            for part in parts:
                work((part, all_blocks(part.shape)))
            return
        # One pool for all tensors: to start threads takes as long as to write a small one.
        runs = [(part, run) for part in parts for run in split_runs(all_blocks(part.shape), THREAD_RUN)]
        with ThreadPoolExecutor(threads) as pool:
            # Only reading the results raises what a thread raised.
            for result in pool.map(work, runs):
                assert result is None

    return move


def store(bank: Hadamard | Gaussian, ordinal: int, old: Array, new: Array, y: Array) -> Displaced:
    """Return a tensor with its displacements, and the random bits of its signs."""
    prepare_output(old, new)
    signs = np.zeros((num_blocks(old.shape) if isinstance(bank, Hadamard) else 1, SIGN_WORDS), np.uint32)
    if isinstance(bank, Hadamard):
        draw_signs(signs, np.uint64(bank.key), np.uint32(ordinal))
    return Displaced(ordinal, old.shape, np.ascontiguousarray(old).reshape(-1), new.reshape(-1), y, signs)


def order_of(bank: Hadamard | Gaussian, moves: Sequence[Move]) -> Order:
    """Return directions as the compiled loop reads them."""
    seeds, amounts = zip(*moves, strict=True)
    rows = [walsh_words(bank.size, seed) for seed in seeds]
    return Order(np.array(seeds, np.uint32), np.array(amounts, np.int32), np.stack(rows))


def write_blocks(where: tuple[Displaced, range], *, bank: Hadamard | Gaussian, order: Order, unit: np.float32) -> None:
    """Move the displacements of a run of a tensor's blocks, and write its weights."""
    part, blocks = where
    place = slice(blocks.start * BLOCK, min(blocks.stop * BLOCK, len(part.old)))
    old, new = part.old[place], part.new[place]
    if not (direct := old.dtype == new.dtype and old.dtype in (DTYPES["fp32"], DTYPES["bf16"])):
        # float16, and a change of format, go through float32 outside of the kernel: numba knows no float16.
        if len(blocks) > RUN:
            for run in split_runs(blocks, RUN):
                write_blocks((part, run), bank=bank, order=order, unit=unit)
            return
        old, new = old.astype(np.float32), np.empty(len(old), np.float32)
    move_loop(bank.name, old.dtype.name)(
        as_bits(old),
        as_bits(new),
        part.y[blocks.start * BLOCK : blocks.stop * BLOCK],
        part.signs[blocks.start : blocks.stop] if isinstance(bank, Hadamard) else part.signs,
        order.seeds,
        order.amounts,
        order.rows,
        np.uint32(bank.size),
        np.uint64(bank.key),
        np.uint32(part.ordinal),
        np.uint32(blocks.start),
        unit,
    )
    if not direct:
        round_into(new, part.new[place])


@cache
def move_loop(bank: str, dtype: str) -> Compiled:
    """Return the compiled loop over blocks that adds directions to their displacements, and writes their weights."""
    add, subtract = (add_signs, subtract_signs) if bank == Hadamard.name else (add_gaussian, subtract_gaussian)
    widen, narrow, direct = WIDEN[dtype], NARROW[dtype], dtype == "float32"

    @compile_nogil
    def run(
        old: Any,
        new: Any,
        y: Any,
        signs: Any,
        seeds: Any,
        amounts: Any,
        rows: Any,
        size: Any,
        key: Any,
        ordinal: Any,
        first: Any,
        unit: Any,
    ) -> None:
        last, words = seeds.size - 1, np.empty(WORDS, np.uint32)
        wide, result = np.empty(BLOCK, np.float32), np.empty(BLOCK, np.float32)
        for number in range(y.size // BLOCK):
            start, stop = number * BLOCK, min((number + 1) * BLOCK, new.size)
            own, bits, block = y[start : start + BLOCK], signs[number % signs.shape[0]], uint32(first + number)
            for n in range(last):
                flip_words(words, bits, rows[n], seeds[n], size)
                add(own, amounts[n], seeds[n], words, key, block, ordinal)
            flip_words(words, bits, rows[last], seeds[last], size)
            # A block that is not whole, and another format, are written by way of two blocks in the cache.
            if direct and stop - start == BLOCK:
                subtract(
                    old[start:stop], new[start:stop], unit, own, amounts[last], seeds[last], words, key, block, ordinal
                )
            else:
                widen(old[start:stop], wide, wide.view(np.uint32))
                subtract(wide, result, unit, own, amounts[last], seeds[last], words, key, block, ordinal)
                narrow(result, result.view(np.uint32), new[start:stop])

    return run


@compile_nogil
def flip_words(words: Any, bits: Any, row: Any, seed: Any, size: Any) -> None:
    """Write a bit for each position of a block: whether the sign of z_k is negative; see `hadamard`."""
    # A group of K positions is K / 32 words, or a part of one: its own random bit d1 is copied to all of it.
    stride, ones, lowest = size // uint32(32), uint32(0xFFFFFFFF), uint32(1)
    if size < uint32(32):
        stride, ones = uint32(1), uint32((uint32(1) << size) - uint32(1))
        lowest = uint32(uint32(0xFFFFFFFF) // ones)
    for n in range(WORDS):
        own = bits[(uint32(n) & ~(stride - uint32(1))) + (seed >> uint32(5))]
        spread = uint32(((own >> (seed & uint32(31))) & lowest) * ones)
        words[n] = spread ^ row[n] ^ bits[WORDS + n]


@compile_nogil
def add_signs(y: Any, amount: Any, seed: Any, words: Any, key: Any, block: Any, ordinal: Any) -> None:
    """Add amount * z_k of the hadamard bank to a block's displacements; all `add_` functions have one signature."""
    for n in range(WORDS):
        for bit in range(32):
            flip = -int32((words[n] >> uint32(bit)) & uint32(1))  # 0 or -1: (a ^ -1) + 1 is -a
            y[n * 32 + bit] += int32((amount ^ flip) - flip)


@compile_nogil
def subtract_signs(
    old: Any, new: Any, unit: Any, y: Any, amount: Any, seed: Any, words: Any, key: Any, block: Any, ordinal: Any
) -> None:
    """Write old - unit * (y + amount * z_k) of a block; all `subtract_` functions have one signature."""
    # The sum goes through no array: another pass over the cache would take as long as all of this.
    for n in range(WORDS):
        word = words[n]
        for bit in range(32):
            flip, j = -int32((word >> uint32(bit)) & uint32(1)), n * 32 + bit
            new[j] = old[j] - float32(int32(y[j] + int32((amount ^ flip) - flip))) * unit


@compile_nogil
def add_gaussian(y: Any, amount: Any, seed: Any, words: Any, key: Any, block: Any, ordinal: Any) -> None:
    """Add amount * m_k of the gaussian bank to a block's displacements; its random numbers are drawn here."""
    drawn = np.empty((4, GAUSSIAN_CALLS), np.uint32)
    even, odd = np.zeros((4, GAUSSIAN_CALLS), np.int32), np.zeros((4, GAUSSIAN_CALLS), np.int32)
    fill_words(drawn, key, uint32(GAUSSIAN | seed << uint32(8)), block, ordinal)
    for n in range(4):
        add_popcounts(even[n], odd[n], drawn[n], amount)
    # Sums may wrap on the way, but modulo 2^32 the result is exact, and it fits into int32.
    eights = int32(8 * amount)
    for i in range(GAUSSIAN_CALLS):
        for n in range(4):
            y[8 * i + 2 * n] += int32(even[n, i] - eights)
            y[8 * i + 2 * n + 1] += int32(odd[n, i] - eights)


@compile_nogil
def subtract_gaussian(
    old: Any, new: Any, unit: Any, y: Any, amount: Any, seed: Any, words: Any, key: Any, block: Any, ordinal: Any
) -> None:
    """Write old - unit * (y + amount * m_k) of a block."""
    moved = y.copy()
    add_gaussian(moved, amount, seed, words, key, block, ordinal)
    for i in range(BLOCK):
        new[i] = old[i] - float32(moved[i]) * unit


@compile_nogil
def widen_float32(old: Any, wide: Any, bits: Any) -> None:
    """Copy a block's weights to float32; `wide` and `bits` share memory."""
    for i in range(old.size):
        wide[i] = old[i]


@compile_nogil
def widen_bfloat16(old: Any, wide: Any, bits: Any) -> None:
    """Copy a block's weights to float32, of which bfloat16 is the upper half."""
    for i in range(old.size):
        bits[i] = uint32(old[i]) << uint32(16)


@compile_nogil
def narrow_float32(wide: Any, bits: Any, new: Any) -> None:
    """Write a block's weights from float32."""
    for i in range(new.size):
        new[i] = wide[i]


@compile_nogil
def narrow_bfloat16(wide: Any, bits: Any, new: Any) -> None:
    """Write a block's weights from float32, to nearest even."""
    for i in range(new.size):
        # Adds half a unit of the last bit that stays, minus one where that bit is even.
        rounded = uint32(bits[i] + uint32(0x7FFF) + ((bits[i] >> uint32(16)) & uint32(1)))
        new[i] = uint16(rounded >> uint32(16))


WIDEN: Mapping[str, Compiled] = {"float32": widen_float32, "bfloat16": widen_bfloat16}
NARROW: Mapping[str, Compiled] = {"float32": narrow_float32, "bfloat16": narrow_bfloat16}
"""By the name of a number format."""


@compile_nogil
def draw_signs(signs: Any, key: Any, ordinal: Any) -> None:
    """Write the random bits of all blocks of a tensor."""
    drawn = np.empty((4, SIGN_CALLS), np.uint32)
    for block in range(signs.shape[0]):
        fill_words(drawn, key, uint32(DENSE_SIGNS), uint32(block), ordinal)
        for i in range(SIGN_CALLS):
            for n in range(4):
                signs[block, 4 * i + n] = drawn[n, i]
