"""The torch client's way to the slopes along all directions at once: one backward pass, projected tensor by tensor.

As soon as the gradient of a tensor is complete it is projected on the directions and dropped: beside the base, its
working copy and the activations, no more than the largest tensor's gradient is in memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from fedtune.directions.bank import DirectionBank
from fedtune.directions.projection_torch import project
from fedtune.directions.rebuild_torch import rewriter
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.model.base import Base
from fedtune.model.batches import Batch
from fedtune.model.loss import summed_loss
from fedtune.model.seed_rebuild import Trio, mean_loss, working_copy
from fedtune.tensors import Array

PIECE = 2**24
"""Numbers of a tensor that are converted together."""


@contextmanager
def at_dense_slope(base: Base, ledger: SeedLedger, trainable: Sequence[int]) -> Iterator[DenseSlope]:
    """Give the weights of any accumulators, and their slopes, inside the block; the base is unchanged afterwards."""
    with working_copy(base, trainable) as trios, requiring_gradients(base, trios):
        yield DenseSlope(base, ledger, trios)


@contextmanager
def requiring_gradients(base: Base, trios: Sequence[Trio]) -> Iterator[None]:
    """Let autograd compute the gradients of the tensors that are replaced, inside the block."""
    parameters = trained_parameters(base, trios).values()
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def trained_parameters(base: Base, trios: Sequence[Trio]) -> Mapping[int, torch.nn.Parameter]:
    """Return the parameters whose data are replaced, by ordinal."""
    named, entries = dict(base.model.named_parameters()), base.manifest.entries
    return {ordinal: named[entries[ordinal].name] for ordinal, _, _ in trios}


class Slopes:
    """The projections of the gradients of one step, summed up over tensors and batches on the base's device."""

    def __init__(self, bank: DirectionBank, device: torch.device) -> None:
        self._bank = bank
        # Metal has no numbers of 64 bits.
        self._device = torch.device("cpu") if device.type == "mps" else device
        numbers = len(range(bank.size)[bank.newest])
        self._sums = torch.zeros(numbers, dtype=torch.float64, device=self._device)

    @contextmanager
    def collect(self, parameters: Mapping[int, torch.nn.Parameter]) -> Iterator[None]:
        """Add the slopes of parameters, by ordinal, in every backward pass inside the block; gradients are dropped."""
        # After all parts of a gradient have been added: a tied tensor gets one from each of its places.
        hooks = [
            parameter.register_post_accumulate_grad_hook(partial(self._project, ordinal))
            for ordinal, parameter in parameters.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def add(self, group: int, slopes: torch.Tensor) -> None:
        """Add the slopes of one group: (K,)."""
        begin = group * self._bank.seeds
        self._sums[begin : begin + self._bank.seeds] += slopes.to(self._device)

    def array(self) -> Array:
        """Return the sums, float64."""
        return self._sums.cpu().numpy()

    def _project(self, ordinal: int, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self._sums += project(self._bank, parameter.grad.to(self._device), ordinal)
        parameter.grad = None


class DenseSlope:
    """Losses and slopes at rewritten weights; every position rebuilds all of them into one working copy."""

    def __init__(self, base: Base, ledger: SeedLedger, trios: Sequence[Trio]) -> None:
        self._base, self._bank, self._parameters = base, ledger.bank, trained_parameters(base, trios)
        self._rewrite = rewriter(trios, bank=ledger.bank, exponent=ledger.exponent)
        self.rms = root_mean_square(own for _, own, _ in trios)

    def move(self, accumulators: Array) -> None:
        """Give the base the weights w(A)."""
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
        slopes = Slopes(self._bank, self._base.device)
        with slopes.collect(self._parameters):
            loss = backward(self._base, parts)
        return loss, slopes.array()


def backward(base: Base, parts: Sequence[Batch]) -> float:
    """Let the gradients of one step appear, batch by batch, and return the mean loss over all of them."""
    # Divided by the count of the whole step, not of each batch: a short last batch must not weigh more.
    count, total = max(1, sum(batch.count for batch in parts)), 0.0
    with torch.enable_grad():
        for batch in parts:
            loss = summed_loss(base.model, batch, task=base.task) / count
            # Tensors that a batch does not use, as experts to which no token is sent, have slopes of zero.
            if loss.requires_grad:
                loss.backward()
            total += loss.item()
    return total


def root_mean_square(tensors: Iterable[torch.Tensor]) -> float:
    """Return the root mean square of the numbers of all tensors together."""
    total, count = 0.0, 0
    for tensor in tensors:
        # In float32, some numbers at a time: the squares of float16 overflow, and sums of 16 bits lose most of them.
        parts = tensor.detach().reshape(-1).split(PIECE)
        total += sum(float(torch.linalg.vector_norm(part.float())) ** 2 for part in parts)
        count += tensor.numel()
    return float((total / max(1, count)) ** 0.5)
