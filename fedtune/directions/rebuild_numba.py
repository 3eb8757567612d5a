"""Rebuilds compiled by numba (the extra `fast`): signs, transform and rounding of a block while it is in the cache.

Code is compiled at its first use, in a few seconds, and stays in memory only: numba would write its cache beside the
installed modules and read it back with pickle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, reduce
from typing import Any, TypeAlias

import numpy as np

from fedtune.directions.bank import DirectionBank, check_accumulators
from fedtune.directions.blocks import BLOCK, all_blocks, positions, split_runs
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import SIGN_WORDS, Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.philox import INCREMENTS, MASK, MULTIPLIERS, ROUNDS, Purpose
from fedtune.directions.rebuild_numpy import prepare_output, round_into, unit_scale
from fedtune.directions.space import Grouped, plain_banks, summands
from fedtune.errors import ExtraError
from fedtune.tensors import DTYPES, Array

try:
    from numba import float32, int32, njit, uint16, uint32, uint64
except ImportError as missing:
    raise ExtraError(
        f'expected numba, which compiles the fast rebuild; got {missing}; run pip install "fedtune[fast]"'
    ) from missing

Compiled: TypeAlias = Callable[..., Any]
# Without fastmath, which would reorder sums and flush small numbers to zero; nogil lets the threads run in parallel.
compile_nogil: Callable[[Callable[..., Any]], Compiled] = njit(nogil=True, error_model="numpy")

RUN = 64
"""Blocks converted together where a number format is not the kernel's own."""
SIGN_CALLS = SIGN_WORDS // 4
GAUSSIAN_CALLS = BLOCK // 8
M0, M1 = MULTIPLIERS
K0, K1 = INCREMENTS
DENSE_SIGNS, GAUSSIAN = int(Purpose.DENSE_SIGNS), int(Purpose.GAUSSIAN)


def rebuild(
    tensor: Array,
    accumulators: Array,
    *,
    bank: DirectionBank,
    ordinal: int,
    exponent: int,
    out: Array | None = None,
    threads: int = 1,
) -> Array:
    """See `rebuild_numpy.Rebuild`; `threads` share the tensor's blocks, and their number changes no bit."""
    out = prepare_output(tensor, out)
    sums, unit = check_accumulators(bank, accumulators), unit_scale(bank, exponent)
    old, new = np.ascontiguousarray(tensor).reshape(-1), out.reshape(-1)
    write = block_writer(bank, sums, ordinal=ordinal, shape=tensor.shape, unit=unit)

    def work(blocks: range) -> None:
        # float16, and a change of format, go through float32 outside of the kernel: numba knows no float16.
        if old.dtype == new.dtype and old.dtype in (DTYPES["fp32"], DTYPES["bf16"]):
            real = positions(blocks, tensor.shape)
            write(blocks, old[real.start : real.stop], new[real.start : real.stop])
            return
        for run in split_runs(blocks, RUN):
            real = positions(run, tensor.shape)
            wide = old[real.start : real.stop].astype(np.float32)
            write(run, wide, wide)
            round_into(wide, new[real.start : real.stop])

    run_in_threads(work, all_blocks(tensor.shape), threads)
    return out


def rewriter(
    tensors: Sequence[tuple[int, Array, Array]], *, bank: DirectionBank, exponent: int, threads: int = 1
) -> Callable[[Array], None]:
    """Return a function that writes w(A) of many tensors, given A; everything that does not depend on A is done once.

    Args:
        tensors: (ordinal, w0, the array that w(A) is written to); see `rebuild_numpy.Rebuild`.
        bank: the directions.
        exponent: e of the displacement unit 2^-e.
        threads: number of threads that share a tensor's blocks.
    """
    # The whole tensor in one compiled call where nothing has to be converted or shared among threads.
    unit, keys = unit_scale(bank, exponent), keys_of(plain_banks(bank))
    by_tensor = isinstance(bank, Grouped) and bank.groups == "tensor"
    direct, others = [], []
    for ordinal, old, new in tensors:
        prepare_output(old, new)
        same = old.dtype == new.dtype and old.dtype in (DTYPES["fp32"], DTYPES["bf16"]) and old.flags.c_contiguous
        if bank.name == Hadamard.name and same and threads == 1:
            run = block_loop(Hadamard, bank.seeds, old.dtype.name)
            direct.append((run, as_bits(old.reshape(-1)), as_bits(new.reshape(-1)), ordinal))
        else:
            others.append((ordinal, old, new))

    def rewrite(accumulators: Array) -> None:
        sums = check_accumulators(bank, accumulators)
        shared = None if by_tensor or not direct else rows_of(bank, sums, direct[0][-1])
        for run, old, new, ordinal in direct:
            rows = rows_of(bank, sums, ordinal) if shared is None else shared
            run(old, new, rows, keys, np.uint32(ordinal), np.uint32(0), unit)
        for number, old, new in others:
            rebuild(old, sums, bank=bank, ordinal=number, exponent=exponent, out=new, threads=threads)

    return rewrite


def displacement(
    bank: DirectionBank,
    accumulators: Array,
    *,
    ordinal: int,
    shape: Sequence[int],
    blocks: range | None = None,
    threads: int = 1,
) -> Array:
    """See `bank.displacement`."""
    chosen = all_blocks(shape) if blocks is None else blocks
    first = positions(chosen, shape).start
    y = np.empty(len(positions(chosen, shape)), np.int32)
    write = block_writer(bank, check_accumulators(bank, accumulators), ordinal=ordinal, shape=shape, unit=np.float32(0))

    def work(part: range) -> None:
        real = positions(part, shape)
        piece = y[real.start - first : real.stop - first]
        write(part, piece, piece)

    run_in_threads(work, chosen, threads)
    return y


def run_in_threads(work: Callable[[range], None], blocks: range, threads: int) -> None:
    """Run `work` on all blocks, split into as many equal parts as there are threads."""
    parts = split_runs(blocks, max(1, -(-len(blocks) // threads)))
    if len(parts) < 2:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor(len(parts)) as pool:
        # Only reading the results raises what a thread raised.
        for result in pool.map(work, parts):
            assert result is None


def block_writer(
    bank: DirectionBank, accumulators: Array, *, ordinal: int, shape: Sequence[int], unit: np.float32
) -> Callable[[range, Array, Array], None]:
    """Return a function (blocks, old, new) that writes a run of blocks, given old and new flat values of one format."""
    parts = summands(bank, accumulators, ordinal)
    dense = [part.vectors if isinstance(part, Kron) and len(shape) < 2 else part for part, _ in parts]
    if isinstance(dense[0], Hadamard | Gaussian):
        kind = Hadamard if isinstance(dense[0], Hadamard) else Gaussian
        keys, rows = keys_of(dense), rows_of(bank, accumulators, ordinal)

        def write(blocks: range, old: Array, new: Array) -> None:
            block_loop(kind, bank.seeds, old.dtype.name)(
                as_bits(old), as_bits(new), rows, keys, np.uint32(ordinal), np.uint32(blocks.start), unit
            )

        return write

    def write_pieces(blocks: range, old: Array, new: Array) -> None:
        start = 0
        for y in bank.pieces(accumulators, ordinal=ordinal, shape=shape, blocks=blocks):
            stop = start + len(y)
            finish_loop(old.dtype.name)(as_bits(old[start:stop]), y, as_bits(new[start:stop]), unit)
            start = stop

    return write_pieces


def keys_of(banks: Sequence[DirectionBank]) -> Array:
    """Return the keys as compiled code takes them, uint64 (banks,)."""
    return np.array([bank.key for bank in banks], np.uint64)


def rows_of(bank: DirectionBank, accumulators: Array, ordinal: int) -> Array:
    """Return the accumulators of each bank for one tensor, as compiled code takes them: int32 (banks, groups, K)."""
    return np.stack([np.atleast_2d(rows) for _, rows in summands(bank, accumulators, ordinal)])


def as_bits(array: Array) -> Array:
    """Return an array in a type that numba knows: bfloat16 as its bits in uint16."""
    return array.view(np.uint16) if array.dtype == DTYPES["bf16"] else array


@cache
def block_loop(kind: type[Hadamard] | type[Gaussian], size: int, dtype: str) -> Compiled:
    """Return the compiled loop over blocks that computes the displacements of a block, then its weights."""
    displace = hadamard_displacement(size) if kind is Hadamard else gaussian_displacement
    finish = FINISH[dtype]

    @compile_nogil
    def run(old: Any, new: Any, rows: Any, keys: Any, ordinal: Any, first: Any, unit: Any) -> None:
        y, other = np.empty(BLOCK, np.int32), np.empty(BLOCK, np.int32)
        wide = np.empty(BLOCK, np.float32)
        for number in range((new.size + BLOCK - 1) // BLOCK):
            block = uint32(first + number)
            group = block % uint32(rows.shape[1])
            displace(y, rows[0, group], keys[0], block, ordinal)
            # While the block is in the cache, whatever the number of banks.
            for n in range(1, keys.size):
                displace(other, rows[n, group], keys[n], block, ordinal)
                for i in range(BLOCK):
                    y[i] += other[i]
            start, stop = number * BLOCK, min((number + 1) * BLOCK, new.size)
            finish(old[start:stop], y, new[start:stop], unit, wide, wide.view(np.uint32))

    return run


@cache
def finish_loop(dtype: str) -> Compiled:
    """Return the compiled loop over blocks that writes weights, given their displacements."""
    finish = FINISH[dtype]

    @compile_nogil
    def run(old: Any, y: Any, new: Any, unit: Any) -> None:
        wide = np.empty(BLOCK, np.float32)
        for start in range(0, new.size, BLOCK):
            stop = min(start + BLOCK, new.size)
            finish(old[start:stop], y[start:stop], new[start:stop], unit, wide, wide.view(np.uint32))

    return run


@compile_nogil
def finish_float32(old: Any, y: Any, new: Any, unit: Any, wide: Any, bits: Any) -> None:
    """Write float32 weights; all `finish_` functions have one signature, and `wide` and `bits` share memory."""
    for i in range(new.size):
        new[i] = old[i] - float32(y[i]) * unit


@compile_nogil
def finish_bfloat16(old: Any, y: Any, new: Any, unit: Any, wide: Any, bits: Any) -> None:
    """Write bfloat16 weights, whose bits are the upper half of a float32's."""
    for i in range(new.size):
        bits[i] = uint32(old[i]) << uint32(16)
    for i in range(new.size):
        wide[i] -= float32(y[i]) * unit
    for i in range(new.size):
        # Rounds to nearest even: adds half a unit of the last bit that stays, minus one where that bit is even.
        rounded = uint32(bits[i] + uint32(0x7FFF) + ((bits[i] >> uint32(16)) & uint32(1)))
        new[i] = uint16(rounded >> uint32(16))


@compile_nogil
def finish_int32(old: Any, y: Any, new: Any, unit: Any, wide: Any, bits: Any) -> None:
    """Write the displacements themselves."""
    for i in range(new.size):
        new[i] = y[i]


FINISH: Mapping[str, Compiled] = {
    "float32": finish_float32,
    "bfloat16": finish_bfloat16,
    "int32": finish_int32,
}
"""How displacements are written, by the format of the result; int32 takes the displacements themselves."""


@compile_nogil
def fill_words(drawn: Any, key: Any, third: Any, block: Any, ordinal: Any) -> None:
    """Write the words of calls 0, 1, ... of one block, word n of call i at [n, i]; see `philox.philox`."""
    for i in range(drawn.shape[1]):
        c0, c1, c2, c3 = uint64(i), uint64(block), uint64(third), uint64(ordinal)
        k0, k1 = key & uint64(MASK), key >> uint64(32)
        for _ in range(ROUNDS):
            # Only the low 32 bits of a word count; bits above them are masked away before each multiplication.
            p0, p1 = (c0 & uint64(MASK)) * uint64(M0), (c2 & uint64(MASK)) * uint64(M1)
            c0, c1, c2, c3 = (p1 >> uint64(32)) ^ c1 ^ k0, p1, (p0 >> uint64(32)) ^ c3 ^ k1, p0
            k0, k1 = k0 + uint64(K0), k1 + uint64(K1)
        drawn[0, i], drawn[1, i], drawn[2, i], drawn[3, i] = uint32(c0), uint32(c1), uint32(c2), uint32(c3)


@cache
def hadamard_displacement(size: int) -> Compiled:
    """Return the function that writes a block's displacements of the hadamard bank."""
    transform = fwht(size)

    @compile_nogil
    def displace(y: Any, accumulators: Any, key: Any, block: Any, ordinal: Any) -> None:
        drawn = np.empty((4, SIGN_CALLS), np.uint32)
        x = np.empty(BLOCK, np.int32)
        fill_words(drawn, key, uint32(DENSE_SIGNS), block, ordinal)
        for n in range(BLOCK // 32):
            word = drawn[n % 4, n // 4]
            for bit in range(32):
                flip = -int32((word >> uint32(bit)) & uint32(1))  # 0 or -1: (a ^ -1) + 1 is -a
                j = n * 32 + bit
                # Each group of K positions starts with the same K accumulators.
                x[j] = (accumulators[j & (size - 1)] ^ flip) - flip
        transform(x)
        for n in range(BLOCK // 32):
            word = drawn[n % 4, SIGN_CALLS // 2 + n // 4]
            for bit in range(32):
                flip = -int32((word >> uint32(bit)) & uint32(1))
                j = n * 32 + bit
                y[j] = (x[j] ^ flip) - flip

    return displace


def fwht(size: int) -> Compiled:
    """Return the transform of each group of `size` of a block's numbers, in place, three steps a pass."""
    passes, width = [], 1
    while width < size:
        # Up to three butterfly steps in registers for one pass over memory.
        radix = min(8, size // width)
        passes.append({2: butterfly_2, 4: butterfly_4, 8: butterfly_8}[radix](width))
        width *= radix
    return reduce(chain, passes) if passes else leave_unchanged


@compile_nogil
def leave_unchanged(x: Any) -> None:
    """Do nothing: the transform of K = 1."""
    return


def chain(first: Compiled, second: Compiled) -> Compiled:
    """Return one function that runs both in turn."""

    @compile_nogil
    def both(x: Any) -> None:
        first(x)
        second(x)

    return both


# The width is a constant of the compiled code: LLVM vectorises loops in place only with distances that it knows.
def butterfly_2(width: int) -> Compiled:
    """Return the pass that combines two numbers at distances of `width`."""

    @compile_nogil
    def step(x: Any) -> None:
        for group in range(BLOCK // (2 * width)):
            for i in range(width):
                p = group * 2 * width + i
                a, b = x[p], x[p + width]
                x[p], x[p + width] = a + b, a - b

    return step


def butterfly_4(width: int) -> Compiled:
    """Return the pass that combines four numbers at distances of `width`."""

    @compile_nogil
    def step(x: Any) -> None:
        for group in range(BLOCK // (4 * width)):
            for i in range(width):
                p = group * 4 * width + i
                a, b, c, d = x[p], x[p + width], x[p + 2 * width], x[p + 3 * width]
                a, b, c, d = a + b, a - b, c + d, c - d
                x[p], x[p + width], x[p + 2 * width], x[p + 3 * width] = a + c, b + d, a - c, b - d

    return step


def butterfly_8(width: int) -> Compiled:
    """Return the pass that combines eight numbers at distances of `width`."""

    @compile_nogil
    def step(x: Any) -> None:
        for group in range(BLOCK // (8 * width)):
            for i in range(width):
                p = group * 8 * width + i
                a, b, c, d = x[p], x[p + width], x[p + 2 * width], x[p + 3 * width]
                e, f, g, h = x[p + 4 * width], x[p + 5 * width], x[p + 6 * width], x[p + 7 * width]
                a, b, c, d, e, f, g, h = a + b, a - b, c + d, c - d, e + f, e - f, g + h, g - h
                a, b, c, d, e, f, g, h = a + c, b + d, a - c, b - d, e + g, f + h, e - g, f - h
                x[p], x[p + width], x[p + 2 * width], x[p + 3 * width] = a + e, b + f, c + g, d + h
                x[p + 4 * width], x[p + 5 * width], x[p + 6 * width], x[p + 7 * width] = a - e, b - f, c - g, d - h

    return step


@compile_nogil
def gaussian_displacement(y: Any, accumulators: Any, key: Any, block: Any, ordinal: Any) -> None:
    """Write a block's displacements of the gaussian bank."""
    drawn = np.empty((4, GAUSSIAN_CALLS), np.uint32)
    even, odd = np.zeros((4, GAUSSIAN_CALLS), np.int32), np.zeros((4, GAUSSIAN_CALLS), np.int32)
    # m is popcount - 8: the eights are summed once for all positions. Sums may wrap on the way, but modulo 2^32 the
    # difference is exact, and it fits into int32.
    eights = int32(0)
    for k in range(accumulators.size):
        a = accumulators[k]
        if a == 0:
            continue
        fill_words(drawn, key, uint32(GAUSSIAN | k << 8), block, ordinal)
        for n in range(4):
            add_popcounts(even[n], odd[n], drawn[n], a)
        eights = int32(eights + 8 * a)
    for i in range(GAUSSIAN_CALLS):
        for n in range(4):
            y[8 * i + 2 * n], y[8 * i + 2 * n + 1] = even[n, i] - eights, odd[n, i] - eights


@compile_nogil
def add_popcounts(even: Any, odd: Any, drawn: Any, a: Any) -> None:
    """Add a times the number of bits set in the low half of each word to `even`, in the high half to `odd`."""
    for i in range(drawn.size):
        # Counts in fields of 2, 4, 8 and 16 bits; the halves are never added up.
        v = drawn[i]
        v = uint32(v - ((v >> uint32(1)) & uint32(0x55555555)))
        v = uint32((v & uint32(0x33333333)) + ((v >> uint32(2)) & uint32(0x33333333)))
        v = uint32((v + (v >> uint32(4))) & uint32(0x0F0F0F0F))
        v = uint32((v + (v >> uint32(8))) & uint32(0x00FF00FF))
        even[i] += int32(a * int32(v & uint32(0xFFFF)))
        odd[i] += int32(a * int32(v >> uint32(16)))
