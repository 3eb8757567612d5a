"""Slopes along the directions of the kron bank: the gradient of the small matrices beside the layers.

No matrix of the base is written, and no gradient of one is ever computed, so that it may be shared, read-only, or
codes: d loss / d M is p times p numbers, which autograd adds up over the layers that share one M.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain

import torch

from fedtune.directions.rebuild_torch import rewriter
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.space import group_of
from fedtune.model.base import Base
from fedtune.model.batches import Batch
from fedtune.model.descend import Slopes, backward, requiring_gradients, root_mean_square, trained_parameters
from fedtune.model.kron_forward import (
    Holder,
    Path,
    add_product,
    has_own_numbers,
    holders_of,
    squares,
    with_paths,
)
from fedtune.model.seed_rebuild import Trio, mean_loss, working_copy
from fedtune.tensors import Array


@contextmanager
def at_kron_slope(base: Base, ledger: SeedLedger, trainable: Sequence[int]) -> Iterator[KronSlope]:
    """Give the weights of any accumulators, and their slopes, inside the block; the base is unchanged afterwards.

    Raises:
        ConfigError: if a matrix belongs to a layer of another kind than linear layers and embeddings.
    """
    entries = base.manifest.entries
    vectors = [ordinal for ordinal in trainable if len(entries[ordinal].shape) < 2]
    holders = holders_of(base, [ordinal for ordinal in trainable if ordinal not in vectors])
    with ExitStack() as stack:
        trios: Sequence[Trio] = stack.enter_context(working_copy(base, vectors)) if vectors else ()
        stack.enter_context(requiring_gradients(base, trios))
        position = KronSlope(base, ledger, holders, trios)
        stack.enter_context(with_paths(base, ledger, holders, position))
        yield position


class KronSlope:
    """Losses and slopes with the change of each matrix beside its layer; vectors are rewritten in working copies."""

    def __init__(self, base: Base, ledger: SeedLedger, holders: Sequence[Holder], trios: Sequence[Trio]) -> None:
        self._base, self._ledger = base, ledger
        self._matrices = sorted({holder.ordinal for holder in holders})
        self._parameters = trained_parameters(base, trios)
        self._rewrite = rewriter(trios, bank=ledger.bank, exponent=ledger.exponent)
        self._blocks: Mapping[int, Sequence[torch.Tensor]] = {}
        """By matrix: M of every bank, oldest first."""
        self._leaves: Mapping[int, torch.Tensor] = {}
        """By group: M of the newest bank."""
        first = {holder.ordinal: holder for holder in holders}  # a tied tensor counts once
        self.rms = root_mean_square(
            chain((getattr(each.module, each.name) for each in first.values()), (own for _, own, _ in trios))
        )

    def rows(self, output: torch.Tensor) -> torch.Tensor:
        """See `kron_forward.Change.rows`."""
        return output

    def add(self, t: torch.Tensor, path: Path, output: torch.Tensor) -> torch.Tensor:
        """See `kron_forward.Change.add`."""
        blocks = self._blocks[path.ordinal]
        matrix = torch.block_diag(*blocks) if len(blocks) > 1 else blocks[0]
        return add_product(output, path.through(t, matrix), path)

    def move(self, accumulators: Array) -> None:
        """Give the base the weights w(A)."""
        bank = self._ledger.bank
        self._blocks = squares(bank, accumulators, self._matrices, self._base.device)
        # One leaf for all matrices that share their numbers: its gradient is then the sum over them.
        self._leaves = {
            group_of(bank, ordinal) if has_own_numbers(bank) else 0: own[-1].requires_grad_(True)
            for ordinal, own in self._blocks.items()
        }
        with torch.no_grad():
            self._rewrite(accumulators)

    def loss(self, accumulators: Array, batch: Batch) -> float:
        """See `descent.Slope.loss`."""
        self.move(accumulators)
        with torch.no_grad():
            return mean_loss(self._base, batch)

    def slopes(self, accumulators: Array, parts: Sequence[Batch]) -> tuple[float, Array]:
        """See `descent.Slope.slopes`."""
        self.move(accumulators)
        slopes = Slopes(self._ledger.bank, self._base.device)
        with slopes.collect(self._parameters):
            loss = backward(self._base, parts)
        for group, leaf in self._leaves.items():
            if leaf.grad is not None:
                # The path has -u in it, a power of two.
                slopes.add(group, leaf.grad.reshape(-1) * -(2.0**self._ledger.exponent))
        return loss, slopes.array()
