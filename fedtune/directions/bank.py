"""What every bank of directions offers, the table of banks, and how large the sums of their directions may grow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from fedtune.directions.blocks import INT32_LIMIT, all_blocks
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.errors import RoundError, ShapeError
from fedtune.tensors import Array


class DirectionBank(Protocol):
    """Directions over every tensor of a model, as a pure function of a key; see `space` for several keys and groups.

    A direction is z_k = m_k / 2^halvings with integers |m_k| <= max_abs, so that the displacement
    y = sum_k A_k m_k is an integer at every position and |y| <= max_abs * span(A).
    """

    @property
    def name(self) -> str:
        """The kind, a key of `BANKS`."""
        ...

    @property
    def code(self) -> int:
        """The kind's byte in a seed ledger."""
        ...

    @property
    def halvings(self) -> int:
        """By which the integers m are divided to have variance 1."""
        ...

    @property
    def max_abs(self) -> int:
        """Largest |m_k| at any position."""
        ...

    @property
    def size(self) -> int:
        """Number of accumulators: banks x groups x K."""
        ...

    @property
    def seeds(self) -> int:
        """K: the number of seeds that probing draws among."""
        ...

    @property
    def key(self) -> int:
        """64 bits, of the newest bank; of a run's first bank it is `derive(seed, "fedkseed.bank")`."""
        ...

    @property
    def newest(self) -> slice:
        """Which accumulators a round may move: groups x K of them, those of the newest bank."""
        ...

    def places(self, seed: int) -> range:
        """Return which accumulators a probing step along a seed moves: those of that number in every group.

        Raises:
            IndexError: if there is no such seed.
        """
        ...

    def span(self, accumulators: Array) -> int:
        """Return the largest sum |A| over the accumulators that meet at one position, exactly."""
        ...

    def pieces(self, accumulators: Array, *, ordinal: int, shape: Sequence[int], blocks: range) -> Iterator[Array]:
        """Yield the displacement y of a run of blocks in consecutive flat pieces of bounded size, int32.

        `accumulators` are A, int32 (size,), as `check_accumulators` returns them. A bank of one group also takes rows
        of them, (groups, K): block b then has the directions times the row b mod groups. `ordinal` is the tensor's
        place in the manifest.
        """
        ...

    def direction(self, index: int, *, ordinal: int, shape: Sequence[int], blocks: range) -> Array:
        """Return m of one accumulator's direction over a run of blocks, int8 (positions,)."""
        ...


BANKS: Mapping[str, Callable[[int, int], DirectionBank]] = {
    Gaussian.name: Gaussian,
    Hadamard.name: Hadamard,
    Kron.name: Kron,
}
"""Constructors by name; they take K and the key."""

BANK_NAMES: Mapping[int, str] = {bank.code: bank.name for bank in (Gaussian, Hadamard, Kron)}
"""Names by the byte of a seed ledger."""


def displacement(
    bank: DirectionBank, accumulators: Array, *, ordinal: int, shape: Sequence[int], blocks: range | None = None
) -> Array:
    """Return the displacement y of a tensor, or of a run of its blocks, int32 (positions,).

    Raises:
        RoundError: if y could leave int32.
        ShapeError: if the accumulators are not `size` integers.
    """
    chosen = all_blocks(shape) if blocks is None else blocks
    pieces = bank.pieces(check_accumulators(bank, accumulators), ordinal=ordinal, shape=shape, blocks=chosen)
    # The empty array keeps the type where a tensor has no positions.
    return np.concatenate([np.empty(0, np.int32), *pieces])


def perturb(bank: DirectionBank, accumulators: Array, seed: int, amount: int) -> Array:
    """Return A with `amount` added along one seed: w(perturb(bank, A, k, E)) is w(A) - E * u * z_k everywhere.

    int64 (size,): whether the sums still fit into 32 bits is for `check_accumulators` to say.
    """
    moved, places = np.array(accumulators, np.int64), bank.places(seed)
    moved[places.start : places.stop : places.step] += amount
    return moved


def headroom(bank: DirectionBank, accumulators: Array, *, amount: int = 0) -> int:
    """Return by how much sum |A| at a position may grow, with a perturbation of `amount` on top; negative: beyond."""
    # One less than 2^31: a sum may have either sign.
    return (INT32_LIMIT - 1) // bank.max_abs - amount - bank.span(accumulators)


def value_bound(bank: DirectionBank, accumulators: Array) -> int:
    """Return an upper bound of |y|: where it is below `FP32_LIMIT`, sums in float32 are exact."""
    return bank.max_abs * bank.span(accumulators)


def check_accumulators(bank: DirectionBank, accumulators: Array) -> Array:
    """Return the accumulators as a contiguous int32 (size,), after a check that every y fits into int32.

    Raises:
        RoundError: if y could leave int32.
        ShapeError: if they are not `size` integers.
    """
    if accumulators.shape != (bank.size,) or accumulators.dtype.kind != "i":
        raise ShapeError(
            f"accumulators: expected {bank.size} signed integers; got {accumulators.dtype} {accumulators.shape}; "
            "take those of the same run's seed ledger"
        )
    if headroom(bank, accumulators) < 0:
        raise RoundError(
            f"accumulators: expected sum |A| of at most {(INT32_LIMIT - 1) // bank.max_abs} for the bank "
            f"{bank.name!r}; got {bank.span(accumulators)}; start again with a coarser unit (a smaller exponent e)"
        )
    # After the check above the sums of 64 bits that `perturb` returns fit as well.
    return np.ascontiguousarray(accumulators, np.int32)
