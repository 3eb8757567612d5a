"""A base at other weights for a while: rebuilt from seeds beside its own, which stay as they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from fedtune.directions.bank import perturb
from fedtune.directions.consistency import fastest_displacement
from fedtune.directions.rebuild_numpy import unit_scale
from fedtune.directions.rebuild_torch import rewriter
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.errors import ConfigError, Fault
from fedtune.model.base import Base
from fedtune.model.train import Batch, summed_loss
from fedtune.tensors import Array

Move = tuple[int, int]
"""A seed, and by how much its accumulator is moved."""
Trio = tuple[int, torch.Tensor, torch.Tensor]
"""Ordinal, the base's own weights, and those that stand in for them."""


@contextmanager
def working_copy(base: Base, trainable: Sequence[int]) -> Iterator[Sequence[Trio]]:
    """Put working copies, not yet written, in the place of the trainable tensors for the length of the block.

    The base's own weights are neither written nor moved: workers share their memory.
    """
    parameters, entries = dict(base.model.named_parameters()), base.manifest.entries
    held = {ordinal: parameters[entries[ordinal].name] for ordinal in trainable}
    own = {ordinal: parameter.data for ordinal, parameter in held.items()}
    trios = [
        (ordinal, data, torch.empty_like(data, memory_format=torch.contiguous_format)) for ordinal, data in own.items()
    ]
    try:
        for ordinal, _, copy in trios:
            held[ordinal].data = copy
        yield trios
    finally:
        for ordinal, data in own.items():
            held[ordinal].data = data


@contextmanager
def with_rebuilt_weights(base: Base, ledger: SeedLedger, trainable: Sequence[int]) -> Iterator[None]:
    """Give the base the weights w(A) of a ledger for the length of the block.

    Raises:
        ConfigError: if the ledger belongs to another base.
    """
    if ledger.manifest != base.manifest.digest:
        expected = f"the base whose manifest has the digest {ledger.manifest.hex()[:16]}"
        got, hint = base.manifest.digest.hex()[:16], "load the same model in the same revision, dtype and seed"
        raise ConfigError(Fault("model.base", expected, got, hint))
    with working_copy(base, trainable) as trios:
        with torch.no_grad():
            rewriter(trios, bank=ledger.bank, exponent=ledger.exponent)(ledger.accumulators)
        yield


class RebuiltPosition:
    """Losses at w(A) and around it; each rebuilds all weights from the accumulators, into one copy of them."""

    def __init__(self, base: Base, ledger: SeedLedger, trios: Sequence[Trio]) -> None:
        self._base, self._sums = base, np.array(ledger.accumulators)
        self._rewrite = rewriter(trios, bank=ledger.bank, exponent=ledger.exponent)

    def losses(self, batch: Batch, moves: Sequence[Move]) -> Sequence[float]:
        """Return the mean loss of the batch at w(A + amount e_k) for each (k, amount)."""
        found = []
        for seed, amount in moves:
            self._rewrite(perturb(self._sums, seed, amount))
            found.append(mean_loss(self._base, batch))
        return found

    def move(self, seed: int, amount: int) -> None:
        """Add to one accumulator for good."""
        self._sums = perturb(self._sums, seed, amount)


class DisplacedPosition:
    """The same for a bank whose sums cost K draws a weight: holds the displacements, whole numbers of 32 bits.

    A move adds one direction to them, which is exact, and costs one draw a weight in place of K.
    """

    def __init__(self, base: Base, ledger: SeedLedger, trios: Sequence[Trio]) -> None:
        self._base, self._bank, self._trios = base, ledger.bank, trios
        self._unit = float(unit_scale(ledger.bank, ledger.exponent))
        self._way = fastest_displacement(ledger.bank)
        self._sums = [self._drawn(ledger.accumulators, ordinal, own) for ordinal, own, _ in trios]

    def losses(self, batch: Batch, moves: Sequence[Move]) -> Sequence[float]:
        """See `Rebuilt.losses`."""
        found, directions = [], dict[int, Sequence[torch.Tensor]]()
        for seed, amount in moves:
            if seed not in directions:
                directions = {seed: self._direction(seed)}  # the two sides of one seed follow each other
            for (_, own, copy), y, z in zip(self._trios, self._sums, directions[seed], strict=True):
                moved = torch.add(y, z, alpha=amount)
                copy.view(-1).copy_(torch.sub(own.reshape(-1).float(), moved.float(), alpha=self._unit))
            found.append(mean_loss(self._base, batch))
        return found

    def move(self, seed: int, amount: int) -> None:
        """See `Rebuilt.move`."""
        for y, z in zip(self._sums, self._direction(seed), strict=True):
            y.add_(z, alpha=amount)

    def _direction(self, seed: int) -> Sequence[torch.Tensor]:
        one = perturb(np.zeros(self._bank.size, np.int32), seed, 1)
        return [self._drawn(one, ordinal, own) for ordinal, own, _ in self._trios]

    def _drawn(self, sums: Array, ordinal: int, own: torch.Tensor) -> torch.Tensor:
        y = self._way(self._bank, sums, ordinal=ordinal, shape=tuple(own.shape))
        return torch.from_numpy(y).to(self._base.device)


def mean_loss(base: Base, batch: Batch) -> float:
    return float(summed_loss(base.model, batch, task=base.task).item()) / max(1, batch.count)
