"""A base at other weights inside a `with` block: rebuilt from seeds beside its own weights, which stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from fedtune.directions.bank import check_accumulators, perturb
from fedtune.directions.kron import Kron
from fedtune.directions.moves_torch import mover
from fedtune.directions.rebuild_torch import rewriter
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.space import check_moved, stacked_factors
from fedtune.errors import ConfigError, Fault
from fedtune.model.base import Base, to_torch
from fedtune.model.base_head import with_head
from fedtune.model.batches import Batch
from fedtune.model.lora import with_layers
from fedtune.model.lora_layer import FrozenParts
from fedtune.model.loss import summed_loss
from fedtune.model.quantised_layers import quantised_layers
from fedtune.probing.steps import Move
from fedtune.tensors import Tensors

Trio = tuple[int, torch.Tensor, torch.Tensor]
"""Ordinal, the base's own weights, and the copy that replaces them."""


@contextmanager
def working_copy(base: Base, trainable: Sequence[int]) -> Iterator[Sequence[Trio]]:
    """Replace the trainable tensors by working copies inside the block; the copies are not yet filled.

    The base's own weights are neither written nor moved: worker processes share their memory.
    """
    parameters, entries = dict(base.model.named_parameters()), base.manifest.entries
    if coded := coded_ordinals(base, trainable):
        raise coded_error(entries[coded[0]].name)
    # `.data` alone is exchanged: modules, hooks and tied names keep the parameter objects that they have.
    trained = {ordinal: parameters[entries[ordinal].name] for ordinal in trainable}
    own = {ordinal: parameter.data for ordinal, parameter in trained.items()}
    base.changed.clear()  # of another run on this base: memory that no client of this one reads
    trios = [
        (ordinal, data, torch.empty_like(data, memory_format=torch.contiguous_format)) for ordinal, data in own.items()
    ]
    try:
        for ordinal, _, copy in trios:
            trained[ordinal].data = copy
        yield trios
    finally:
        for ordinal, data in own.items():
            trained[ordinal].data = data


@contextmanager
def with_rebuilt_weights(
    base: Base, ledger: SeedLedger, trainable: Sequence[int], head: Tensors | None = None
) -> Iterator[None]:
    """Give the base the weights w(A) of a ledger inside the block; with a head, those of the base with that head.

    Raises:
        ConfigError: if the ledger belongs to another base, or has numbers of its own for other tensors.
    """
    with with_head(base, head or {}) as own:
        # Accumulators are displacements from one base: over any other weights they are noise.
        check_manifest(own, ledger)
        check_moved(ledger.bank, trainable)
        coded = coded_ordinals(own, trainable) if ledger.bank.name == Kron.name else ()
        plain = [ordinal for ordinal in trainable if ordinal not in coded]
        with working_copy(own, plain) as trios, with_layers(own.model, {}, changes_beside(own, ledger, coded)):
            with torch.no_grad():
                rewriter(trios, bank=ledger.bank, exponent=ledger.exponent)(ledger.accumulators)
            yield


def check_manifest(base: Base, ledger: SeedLedger) -> None:
    """Refuse a ledger of another base.

    Raises:
        ConfigError: with both digests.
    """
    if ledger.manifest != base.manifest.digest:
        expected = f"the base whose manifest has the digest {ledger.manifest.hex()[:16]}"
        got, hint = base.manifest.digest.hex()[:16], "load the same model in the same revision, dtype and seed"
        raise ConfigError(Fault("model.base", expected, got, hint))


def coded_ordinals(base: Base, trainable: Sequence[int]) -> Sequence[int]:
    """Return which of the tensors are there as codes alone."""
    entries, quantised = base.manifest.entries, {f"{name}.weight" for name in quantised_layers(base.model)}
    return [ordinal for ordinal in trainable if entries[ordinal].name in quantised]


def coded_error(name: str) -> ConfigError:
    """Return the error of weights that would have to be rewritten, which codes cannot hold."""
    expected = "'kron' over a quantised base, whose changes stand beside the codes"
    hint = 'set bank = "kron", or model.dtype = "bfloat16"'
    return ConfigError(Fault("method.bank", expected, f"one that rewrites {name}, of which there are codes", hint))


def changes_beside(base: Base, ledger: SeedLedger, ordinals: Sequence[int]) -> Mapping[str, FrozenParts]:
    """Return the change of each quantised layer that the bank `kron` moves, as factors to multiply by beside it."""
    layers, entries = quantised_layers(base.model), base.manifest.entries
    changes = dict[str, FrozenParts]()
    for ordinal in ordinals:
        name = entries[ordinal].name.removesuffix(".weight")
        factors = stacked_factors(
            ledger.bank,
            ledger.accumulators,
            ordinal=ordinal,
            shape=entries[ordinal].shape,
            exponent=ledger.exponent,
            transposed=layers[name].transposed,
        )
        changes[name] = tuple(to_torch(factor, base.device) for factor in factors)
    return changes


class RebuiltPosition:
    """Losses at w(A) and around it; every loss rebuilds all weights from the accumulators, into one working copy."""

    def __init__(self, base: Base, ledger: SeedLedger, trios: Sequence[Trio]) -> None:
        self._base, self._bank, self._sums = base, ledger.bank, np.array(ledger.accumulators)
        self._rewrite = rewriter(trios, bank=ledger.bank, exponent=ledger.exponent)

    def losses(self, batch: Batch, moves: Sequence[Move]) -> Sequence[float]:
        """Return the mean loss of the batch at w(A + amount e_k) for each (k, amount)."""
        losses = []
        for seed, amount in moves:
            self._rewrite(perturb(self._bank, self._sums, seed, amount))
            losses.append(mean_loss(self._base, batch))
        return losses

    def move(self, seed: int, amount: int) -> None:
        """Add an amount to one accumulator for good."""
        self._sums = perturb(self._bank, self._sums, seed, amount)


class DisplacedPosition:
    """The same with the displacements in memory, to which a loss or a move adds one direction; see `moves_torch`."""

    def __init__(self, base: Base, ledger: SeedLedger, trios: Sequence[Trio]) -> None:
        self._base, self._bank, self._sums = base, ledger.bank, np.array(ledger.accumulators)
        self._write = mover(trios, self._sums, bank=ledger.bank, exponent=ledger.exponent)
        self._moves = list[Move]()
        self._written: Move | None = None

    def losses(self, batch: Batch, moves: Sequence[Move]) -> Sequence[float]:
        """See `RebuiltPosition.losses`."""
        losses = []
        for seed, amount in moves:
            self._write_beside((seed, amount) if amount else (0, 0))  # without an amount one seed is like another
            losses.append(mean_loss(self._base, batch))
        return losses

    def move(self, seed: int, amount: int) -> None:
        """See `RebuiltPosition.move`; the displacements are moved when weights are written next, in the same pass."""
        self._sums = perturb(self._bank, self._sums, seed, amount)
        self._moves.append((seed, amount))

    def _write_beside(self, beside: Move) -> None:
        if not self._moves and beside == self._written:
            return
        # Before anything is written: a sum beyond 32 bits would wrap around.
        check_accumulators(self._bank, perturb(self._bank, self._sums, *beside))
        self._write(self._moves, beside)
        self._moves, self._written = [], beside


def mean_loss(base: Base, batch: Batch) -> float:
    """Return the mean loss of a batch at the weights that the base has now."""
    return float(summed_loss(base.model, batch, task=base.task).item()) / max(1, batch.count)
