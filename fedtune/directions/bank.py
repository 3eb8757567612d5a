"""What every bank of directions gives, and how large the sums of its directions may grow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

import numpy as np

from fedtune.directions.blocks import whole
from fedtune.errors import ConfigError, Fault, RoundError, ShapeError
from fedtune.tensors import Array

MAX_SIZE = 4096
INT32_LIMIT = 2**31
FP32_LIMIT = 2**24
"""Below it a sum of integers is exact in float32, in any order."""


class DirectionBank(Protocol):
    """K directions over every tensor of a model, as a pure function of a key.

    A direction is z_k = m_k / 2^halvings with integers m_k of at most `reach`, so that the displacement
    y = sum_k A_k m_k is an integer at every position and |y| <= reach * sum_k |A_k|.
    """

    name: ClassVar[str]
    code: ClassVar[int]
    """The bank's byte in a seed ledger."""
    halvings: ClassVar[int]
    reach: ClassVar[int]

    @property
    def size(self) -> int:
        """K."""
        ...

    @property
    def key(self) -> int:
        """64 bits: `derive(seed, "fedkseed.bank")`, constant for a run."""
        ...

    def pieces(self, accumulators: Array, *, ordinal: int, shape: Sequence[int], blocks: range) -> Iterator[Array]:
        """Yield the displacement y of a run of blocks in consecutive flat pieces of bounded size, int32.

        `accumulators` are A, int32 (K,), as `checked` returns them; `ordinal` is the tensor's place in the manifest.
        """
        ...

    def direction(self, index: int, *, ordinal: int, shape: Sequence[int], blocks: range) -> Array:
        """Return m of one direction over a run of blocks, int8 (positions,)."""
        ...


def displacement(
    bank: DirectionBank, accumulators: Array, *, ordinal: int, shape: Sequence[int], blocks: range | None = None
) -> Array:
    """Return y of a tensor or of a run of its blocks, int32 (positions,).

    Raises:
        RoundError: if y could leave int32.
        ShapeError: if the accumulators are not K integers.
    """
    chosen = whole(shape) if blocks is None else blocks
    pieces = bank.pieces(check_accumulators(bank, accumulators), ordinal=ordinal, shape=shape, blocks=chosen)
    return np.concatenate([np.empty(0, np.int32), *pieces])


def perturb(accumulators: Array, index: int, amount: int) -> Array:
    """Return A with `amount` added to one direction's integer: w(perturbed(A, k, E)) is w(A) - E * u * z_k.

    In 64 bits: whether the sums still fit into 32 is for `checked` to say.
    """
    moved = np.array(accumulators, np.int64)
    moved[index] += amount
    return moved


def headroom(bank: DirectionBank, accumulators: Array, *, amount: int = 0) -> int:
    """Return by how much sum |A| may still grow, with a perturbation of `amount` on top; negative if it is beyond."""
    return (INT32_LIMIT - 1) // bank.reach - amount - total(accumulators)


def value_bound(bank: DirectionBank, accumulators: Array) -> int:
    """Return what no |y| exceeds: below `FP32_LIMIT` sums in float32 are exact."""
    return bank.reach * total(accumulators)


def total(accumulators: Array) -> int:
    """Return sum |A|, exactly."""
    return int(np.abs(accumulators.astype(np.int64)).sum())


def check_accumulators(bank: DirectionBank, accumulators: Array) -> Array:
    """Return the accumulators as a contiguous int32 (K,), after a check that every y fits into int32.

    Raises:
        RoundError: if y could leave int32.
        ShapeError: if they are not K integers.
    """
    if accumulators.shape != (bank.size,) or accumulators.dtype.kind != "i":
        raise ShapeError(
            f"accumulators: expected {bank.size} signed integers; got {accumulators.dtype} {accumulators.shape}; "
            "take those of the same run's seed ledger"
        )
    if headroom(bank, accumulators) < 0:
        raise RoundError(
            f"accumulators: expected sum |A| of at most {(INT32_LIMIT - 1) // bank.reach} for the bank {bank.name!r}; "
            f"got {total(accumulators)}; start again with a coarser unit (a smaller exponent e)"
        )
    return np.ascontiguousarray(accumulators, np.int32)


def check_size(size: int, name: str, *, power: int = 2) -> None:
    """Raise ConfigError unless K is a power of 2 (of 4 for kron) from 1 to 4096, naming the nearest that is one."""
    legal = [power**n for n in range(13) if power**n <= MAX_SIZE]
    if size not in legal:
        nearest = min(legal, key=lambda one: (abs(one - size), one))
        expected = f"a power of {power} from 1 to {MAX_SIZE} for the bank {name!r}"
        raise ConfigError(Fault("seeds", expected, str(size), f"the nearest is {nearest}"))


def check_key(key: int) -> None:
    """Raise ConfigError unless a bank's key has 64 bits."""
    if not 0 <= key < 2**64:
        raise ConfigError(Fault("key", "an integer of 64 bits", str(key), "make it with seeds.derive"))
