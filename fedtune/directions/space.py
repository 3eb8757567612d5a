"""Directions of several banks and groups: more numbers than the K of one bank, at the same cost of a random number.

A run may *redraw*: it goes on with the directions of a new key, while those of earlier keys stay in the weights. And it
may divide the positions into *groups*, each with K accumulators of its own. The accumulators of both are one flat
vector, banks x groups x K, oldest bank first:

    w = w0 - u * sum over banks n of sum over k of A[n, group of the position, k] * z_k of bank n
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fedtune.directions.bank import BANKS, DirectionBank
from fedtune.directions.blocks import BLOCK, Groups, places_of, positions
from fedtune.directions.kron import Kron, change_factors
from fedtune.errors import ConfigError, Fault
from fedtune.tensors import Array

MAX_GROUPS = 64
MAX_BANKS = 256
"""Every one costs another pass of each rebuild."""
MAX_TENSORS = 2**12
"""With a group for each."""
MAX_ACCUMULATORS = 2**20
"""4 MiB as they travel at most, within the limit of a message's header; beyond, adapters of LoRA are shorter."""


@dataclass(frozen=True)
class Grouped:
    """Directions of one or more banks of the same kind and K, over one or more groups of positions.

    See `bank.DirectionBank` for what is not explained here.
    """

    banks: tuple[DirectionBank, ...]
    """One for each key, oldest first, each of one group."""
    groups: Groups = 1
    tensors: tuple[int, ...] = ()
    """Of the groups "tensor": ordinals of the tensors that are moved, in rising order."""

    def __post_init__(self) -> None:
        # The banks first: what is asked below needs one.
        if faults := list(bank_faults(self.banks)) or list(group_faults(self.name, self.groups, self.tensors)):
            raise ConfigError(faults)
        if len(self.banks) == 1 and self.groups == 1:
            # It would be a second form, with another digest, of what the bank alone is.
            raise ConfigError(Fault("groups", "several banks or groups", "one of each", "use the bank itself"))
        if self.size > MAX_ACCUMULATORS:
            expected = f"at most {MAX_ACCUMULATORS} numbers: banks x groups x K"
            got = f"{len(self.banks)} x {self.num_groups} x {self.seeds}"
            raise ConfigError(Fault("groups", expected, got, "take fewer seeds or groups, or redraw less often"))

    @property
    def name(self) -> str:
        """See `DirectionBank.name`."""
        return self.banks[0].name

    @property
    def code(self) -> int:
        """See `DirectionBank.code`."""
        return self.banks[0].code

    @property
    def halvings(self) -> int:
        """See `DirectionBank.halvings`."""
        return self.banks[0].halvings

    @property
    def max_abs(self) -> int:
        """See `DirectionBank.max_abs`."""
        return self.banks[0].max_abs

    @property
    def num_groups(self) -> int:
        """G, for "tensor" the number of tensors."""
        return len(self.tensors) if self.groups == "tensor" else self.groups

    @property
    def size(self) -> int:
        """See `DirectionBank.size`."""
        return len(self.banks) * self.num_groups * self.seeds

    @property
    def seeds(self) -> int:
        """See `DirectionBank.seeds`."""
        return self.banks[0].size

    @property
    def key(self) -> int:
        """See `DirectionBank.key`."""
        return self.banks[-1].key

    @property
    def newest(self) -> slice:
        """See `DirectionBank.newest`."""
        return slice(self.size - self.num_groups * self.seeds, self.size)

    def places(self, seed: int) -> range:
        """See `DirectionBank.places`."""
        return places_of(seed, self.seeds, groups=self.num_groups, start=self.newest.start)

    def span(self, accumulators: Array) -> int:
        """See `DirectionBank.span`: the banks of one group meet, two groups never do."""
        # In 64 bits: the absolute value of -2^31 does not fit into int32.
        cube = np.abs(accumulators.astype(np.int64)).reshape(len(self.banks), self.num_groups, self.seeds)
        return int(cube.sum(axis=(0, 2)).max())

    def pieces(self, accumulators: Array, *, ordinal: int, shape: Sequence[int], blocks: range) -> Iterator[Array]:
        """See `DirectionBank.pieces`."""
        parts = [
            bank.pieces(rows, ordinal=ordinal, shape=shape, blocks=blocks)
            for bank, rows in summands(self, accumulators, ordinal)
        ]
        # In int32: no partial sum exceeds the span, which `check_accumulators` holds below 2^31.
        for first, *others in zip(*parts, strict=True):
            y = first
            for other in others:
                y = y + other
            yield y

    def direction(self, index: int, *, ordinal: int, shape: Sequence[int], blocks: range) -> Array:
        """See `DirectionBank.direction`; zero outside of the accumulator's group."""
        (bank, group), k = divmod(index // self.seeds, self.num_groups), index % self.seeds
        m = self.banks[bank].direction(k, ordinal=ordinal, shape=shape, blocks=blocks)
        if self.groups == "tensor":
            return m * np.int8(self.tensors[group] == ordinal)
        owner = np.arange(blocks.start, blocks.stop) % self.groups
        return m * np.repeat(owner == group, BLOCK)[: len(positions(blocks, shape))].astype(np.int8)


def directions(
    bank: str, seeds: int, keys: Sequence[int], groups: Groups = 1, tensors: Sequence[int] = ()
) -> DirectionBank:
    """Return the directions of a run: of one plain bank, or several and of groups.

    Args:
        bank: a name of `bank.BANKS`.
        seeds: K.
        keys: of 64 bits, one for each bank, oldest first.
        groups: see `blocks.Groups`.
        tensors: ordinals of the tensors that are moved, which the groups "tensor" need.

    Raises:
        ConfigError: if there are no such directions.
    """
    plain = tuple(BANKS[bank](seeds, key) for key in keys)
    # One key and one group in the form that they always had, so that its ledger and digest are the same.
    if len(plain) == 1 and groups == 1:
        return plain[0]
    return Grouped(plain, groups, tuple(tensors) if groups == "tensor" else ())


def plain_banks(bank: DirectionBank) -> tuple[DirectionBank, ...]:
    """Return the banks of one key and one group that directions consist of, oldest first."""
    return bank.banks if isinstance(bank, Grouped) else (bank,)


def summands(bank: DirectionBank, accumulators: Array, ordinal: int) -> Sequence[tuple[DirectionBank, Array]]:
    """Return plain banks, each with its accumulators for one tensor: (K,), or rows of them for groups of blocks.

    The tensor's displacement is the sum of theirs; see `DirectionBank.pieces` for rows.

    Raises:
        ConfigError: if every tensor is a group, and this one is none.
    """
    if not isinstance(bank, Grouped):
        return [(bank, accumulators)]
    cube = accumulators.reshape(len(bank.banks), bank.num_groups, bank.seeds)
    if bank.groups == "tensor":
        cube = cube[:, group_of(bank, ordinal)]
    elif bank.groups == 1:
        cube = cube[:, 0]
    return list(zip(bank.banks, cube, strict=True))


def group_of(bank: Grouped, ordinal: int) -> int:
    """Return the group of a tensor, where every tensor is one.

    Raises:
        ConfigError: if it is none.
    """
    if ordinal not in bank.tensors:
        expected = f"one of the tensors {list(bank.tensors)[:8]} that have numbers of their own"
        raise ConfigError(Fault("groups", expected, str(ordinal), "name the tensors of the run that wrote the ledger"))
    return bank.tensors.index(ordinal)


def check_moved(bank: DirectionBank, trainable: Sequence[int]) -> None:
    """Raise ConfigError where directions with a group for each tensor belong to others than those that are moved.

    With fewer of them the weights would be those of no round of the run.
    """
    if isinstance(bank, Grouped) and bank.groups == "tensor" and tuple(trainable) != bank.tensors:
        expected, got = (f"{len(ordinals)} tensors, {list(ordinals)[:8]}" for ordinals in (bank.tensors, trainable))
        hint = "name the tensors that the run moved, as its folder of seeds does"
        raise ConfigError(Fault("trainable", f"those that the ledger has numbers for: {expected}", got, hint))


def stacked_factors(
    bank: DirectionBank,
    accumulators: Array,
    *,
    ordinal: int,
    shape: Sequence[int],
    exponent: int,
    transposed: bool = False,
) -> tuple[Array, Array]:
    """Return a matrix's change by banks of kron as factors a (r, in) and b (out, r), float32; r is p for each bank.

    See `kron.change_factors`, whose factors of one bank stand below those of the bank before it.
    """
    a, b = list[Array](), list[Array]()
    for plain, sums in summands(bank, accumulators, ordinal):
        assert isinstance(plain, Kron)
        factors = change_factors(plain, sums, ordinal=ordinal, shape=shape, exponent=exponent, transposed=transposed)
        a.append(factors[0])
        b.append(factors[1])
    return np.concatenate(a), np.concatenate(b, axis=1)


def group_faults(name: str, groups: Groups, tensors: Sequence[int]) -> Iterator[Fault]:
    """Yield what is wrong with groups of a bank of this name."""
    if groups == "tensor":
        if not 1 <= len(tensors) <= MAX_TENSORS or tensors[0] < 0 or any(a >= b for a, b in pairwise(tensors)):
            hint = "state the tensors that are moved"
            yield Fault(
                "groups", f'1 to {MAX_TENSORS} ordinals in rising order for "tensor"', str(list(tensors)[:8]), hint
            )
        return
    legal = [2**n for n in range(MAX_GROUPS.bit_length())]
    if groups not in legal or tensors:
        hint = f"the nearest is {min(legal, key=lambda n: (abs(n - groups), n))}"
        yield Fault("groups", f'a power of 2 from 1 to {MAX_GROUPS}, or "tensor"', str(groups), hint)
    elif groups > 1 and name == "kron":
        # Groups of blocks would cut a matrix into pieces that are no products of factors.
        yield Fault("groups", "1 or \"tensor\" with the bank 'kron'", str(groups), 'set groups = "tensor"')


def bank_faults(banks: Sequence[DirectionBank]) -> Iterator[Fault]:
    """Yield what is wrong with the banks of a run."""
    keys = [bank.key for bank in banks]
    if not 1 <= len(keys) <= MAX_BANKS:
        yield Fault("keys", f"of 1 to {MAX_BANKS} banks", str(len(keys)), "redraw less often, or end the run")
    elif len(set(keys)) < len(keys):
        yield Fault("keys", "another one for every bank", "one twice", "derive each from the run's seed")
    elif len({(type(bank), bank.size) for bank in banks}) > 1 or isinstance(banks[0], Grouped):
        yield Fault("banks", "banks of one kind and one K, each of one group", "others", "use `directions`")
