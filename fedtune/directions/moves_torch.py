"""Weights beside w(A) with torch, on the device of a model's tensors: displacements that stay in memory, and moves.

A rebuild sums all K directions anew. Here the displacements of A are stored, int32, and the random bits of their signs,
packed: a move along one direction, or a loss beside w(A), costs about a copy of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from fedtune.directions.bank import DirectionBank, check_accumulators, perturb
from fedtune.directions.blocks import BLOCK, all_blocks, num_blocks, positions, split_runs
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import SIGN_WORDS, Hadamard, walsh_words
from fedtune.directions.philox import Purpose
from fedtune.directions.rebuild_numpy import unit_scale
from fedtune.directions.rebuild_torch import (
    WORD,
    as_array,
    displacement,
    fastest,
    prepare_output,
    rebuild_compiled,
    words,
)
from fedtune.directions.space import plain_banks
from fedtune.tensors import Array

Move: TypeAlias = tuple[int, int]
"""A direction, and by how much its accumulator is moved."""
Mover: TypeAlias = Callable[[Sequence[Move], Move], None]
"""(moves, beside): moves A for good, and writes the weights of A moved by `beside` as well, which is not for good."""

RUN = {"cpu": 64, "cuda": 8192}
"""Blocks at a time: 1 MiB of int32 stays in a CPU's cache; a GPU needs 128 MiB to have work for all of its cores."""


def stored_bytes(bank: DirectionBank, sizes: Sequence[int]) -> int | None:
    """Return the memory that a mover takes for tensors of these sizes; None for a bank that it does not serve."""
    newest = plain_banks(bank)[-1]
    if not isinstance(newest, Hadamard | Gaussian):
        return None
    per_block = 4 * BLOCK + (4 * SIGN_WORDS if isinstance(newest, Hadamard) else 0)
    return per_block * sum(num_blocks((size,)) for size in sizes)


@torch.no_grad()
def mover(
    tensors: Sequence[tuple[int, torch.Tensor, torch.Tensor]],
    accumulators: Array,
    *,
    bank: DirectionBank,
    exponent: int,
) -> Mover:
    """Return what moves the weights of many tensors of one device, in the quickest installed way.

    What it writes has the bits of a rebuild at the same accumulators. That these stay within 32 bits, with every move
    and with what is beside them, is for the caller to check; see `bank.check_accumulators`.

    Args:
        tensors: (ordinal, w0, the tensor that is written to), both contiguous.
        accumulators: A, int32 (size,).
        bank: hadamard or gaussian directions, of any banks and groups: a move along a seed is one along the same number
            of all groups of the newest bank, and so along that bank's own direction.
        exponent: e of the displacement unit 2^-e.

    Raises:
        ShapeError: if the shapes of a pair differ, or a number format is none of float32, float16 and bfloat16.
        RoundError: if torch's arithmetic is not exact, or a displacement could leave int32.
    """
    newest = plain_banks(bank)[-1]
    assert isinstance(newest, Hadamard | Gaussian)
    sums, unit = check_accumulators(bank, accumulators), unit_scale(bank, exponent)
    compiled = True
    for _, old, new in tensors:
        prepare_output(old, new)
        compiled = fastest(old.device) is rebuild_compiled
    if compiled:
        from fedtune.directions import moves_numba, rebuild_numba

        threads = torch.get_num_threads()
        arrays = []
        for ordinal, old, new in tensors:
            # Displacements depend on the place in a tensor alone: those of its whole blocks begin with its own.
            whole = (num_blocks(old.shape) * BLOCK,)
            y = rebuild_numba.displacement(bank, sums, ordinal=ordinal, shape=whole, threads=threads)
            arrays.append((ordinal, as_array(old.contiguous()), as_array(new), y))
        return moves_numba.mover(arrays, bank=newest, unit=unit, threads=threads)
    parts = [store(bank, newest, sums, *tensor) for tensor in tensors]

    @torch.no_grad()
    def move(moves: Sequence[Move], beside: Move) -> None:
        for part in parts:
            for run in split_runs(all_blocks(part.new.shape), RUN.get(part.new.device.type, RUN["cuda"])):
                write_blocks(part, run, bank=newest, moves=moves, beside=beside, unit=float(unit))

    return move


@dataclass(frozen=True)
class Displaced:
    """A tensor, and what is stored of its displacements."""

    ordinal: int
    old: torch.Tensor
    """w0, flat."""
    new: torch.Tensor
    """What is written, flat."""
    y: torch.Tensor
    """Displacements of A, int32 (positions,)."""
    signs: torch.Tensor
    """Random bits of the hadamard bank, int32 (blocks, 256); of other banks none."""


def store(
    bank: DirectionBank,
    newest: Hadamard | Gaussian,
    sums: Array,
    ordinal: int,
    old: torch.Tensor,
    new: torch.Tensor,
) -> Displaced:
    """Return a tensor with its displacements, and the random bits of its signs."""
    y = displacement(bank, sums, ordinal=ordinal, shape=old.shape, device=old.device)
    signs = torch.empty(0, SIGN_WORDS, dtype=torch.int32, device=old.device)
    if isinstance(newest, Hadamard):
        drawn = [
            words(newest.key, Purpose.DENSE_SIGNS, run, calls=SIGN_WORDS // 4, ordinal=ordinal, device=old.device)
            for run in split_runs(all_blocks(old.shape), RUN["cuda"])
        ]
        signs = torch.cat([signs, *drawn])
    return Displaced(ordinal, old.contiguous().view(-1), new.view(-1), y, signs)


def write_blocks(
    part: Displaced, run: range, *, bank: Hadamard | Gaussian, moves: Sequence[Move], beside: Move, unit: float
) -> None:
    """Move the displacements of a run of blocks, and write its weights."""
    real = positions(run, part.new.shape)
    place = slice(real.start, real.stop)
    y = part.y[place]
    for index, amount in moves:
        y.add_(direction(part, run, bank, index), alpha=amount)
    index, amount = beside
    moved = torch.add(y, direction(part, run, bank, index), alpha=amount) if amount else y
    # Integers until here; then the rounding rule of `rebuild_numpy`, so that both give the same bits.
    part.new[place] = torch.sub(part.old[place].float(), moved.float(), alpha=unit)


def direction(part: Displaced, run: range, bank: Hadamard | Gaussian, index: int) -> torch.Tensor:
    """Return m of one direction over a run of blocks, int32 (positions,)."""
    real, device = positions(run, part.new.shape), part.new.device
    if isinstance(bank, Gaussian) and device.type == "cpu":  # numpy draws them in a twentieth of torch's time there
        drawn = bank.direction(index, ordinal=part.ordinal, shape=part.new.shape, blocks=run)
        return torch.from_numpy(drawn).to(torch.int32)
    if isinstance(bank, Gaussian):
        alone = perturb(bank, np.zeros(bank.size, np.int32), index, 1)
        return displacement(bank, alone, ordinal=part.ordinal, shape=part.new.shape, blocks=run, device=device)
    signs = part.signs[run.start : run.stop]
    first, second = signs[:, : SIGN_WORDS // 2], signs[:, SIGN_WORDS // 2 :]
    row = torch.from_numpy(walsh_words(bank.size, index).view(np.int32)).to(device)
    odd = spread(first, bank.size, index) ^ second ^ row
    places = torch.arange(WORD, dtype=torch.int32, device=device)
    bits = (odd.unsqueeze(-1) >> places).bitwise_and_(1)
    return bits.mul_(-2).add_(1).view(-1)[: len(real)]


def spread(first: torch.Tensor, size: int, index: int) -> torch.Tensor:
    """Return the random bits d1 of a direction at all positions of a group: int32 (blocks, 128)."""
    if size >= WORD:
        stride, place = size // WORD, index // WORD
        own = first[:, place::stride]  # (blocks, groups)
        return (own >> (index % WORD)).bitwise_and_(1).neg_().repeat_interleave(stride, dim=1)
    # Several groups in a word: the bit of each, times a number of `size` ones.
    lowest = sum(1 << place for place in range(0, WORD, size))
    own = (first.long() >> index) & lowest
    return (own * ((1 << size) - 1)).to(torch.int32)
