"""Directions of the kron bank added in the forward pass: no weight is rewritten, and all losses share one batch.

For a stored matrix (R, C) the change -u U^T M V is a low-rank path beside the layer, p numbers wide; a perturbation
along z_k, k = i p + j, adds a multiple of one of these p numbers to another of them. So the base may be shared,
read-only, or of a number format that cannot hold small steps.

Shapes: p is the bank's rank, p * p = K; U is (p, R), V is (p, C), M holds the accumulators as (p, p); u = 2^-e.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.directions.bank import perturb
from fedtune.directions.kron import Kron
from fedtune.directions.rebuild_torch import rewriter
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.errors import ClientError, ConfigError, Fault, type_of
from fedtune.model.base import Base
from fedtune.model.batches import Batch
from fedtune.model.loss import cross_entropies, logits_of
from fedtune.model.quantised_layers import quantised_layers
from fedtune.model.quantised_linear import QuantisedLinear
from fedtune.probing.steps import Move


@dataclass(frozen=True)
class Path:
    """The low-rank path beside one layer, from p numbers t of its input to p numbers h of its output."""

    first: torch.Tensor
    """(p, in), float32."""
    second: torch.Tensor
    """(p, out), float32, already times -u, which is exact for a power of two."""
    by_columns: bool
    """Whether t belongs to the columns of M, h = t M^T, as in nn.Linear; else to its rows, h = t M."""


@dataclass(frozen=True)
class Vector:
    """A trainable tensor of one dimension (or none), and the module that holds it."""

    ordinal: int
    name: str
    """Within the module."""
    module: nn.Module


class Injected:
    """Losses at w(A) and around it, by one forward pass over the batch repeated once for each loss."""

    def __init__(self, base: Base, ledger: SeedLedger, bank: Kron, vectors: Sequence[Vector]) -> None:
        self._base, self._bank, self._exponent, self._vectors = base, bank, ledger.exponent, vectors
        self._sums = np.array(ledger.accumulators)
        self.unit = 2.0**-ledger.exponent
        self.matrix = self._square()
        """M, float32 (p, p)."""
        self.moves: Sequence[Move] = ()
        self.num_rows = self.num_columns = 0
        """Of the repeated batch."""
        self.parts: Sequence[Mapping[int, torch.Tensor]] = ()
        """For each move, the vectors at w(A + amount e_k), by ordinal."""

    def losses(self, batch: Batch, moves: Sequence[Move]) -> Sequence[float]:
        """See `seed_rebuild.RebuiltPosition.losses`."""
        count = len(moves)
        self.moves, self.num_rows = moves, count * len(batch.input_ids)
        self.num_columns = batch.input_ids.shape[1]
        self.parts = [self._moved_vectors(seed, amount) for seed, amount in moves] if self._vectors else ()
        # One pass for all losses of a step: the base is read once, and small batches fill the machine.
        repeated = Batch(
            batch.input_ids.repeat(count, 1),
            batch.attention_mask.repeat(count, 1),
            batch.labels,
            batch.count,
            batch.tokens,
            None if batch.token_types is None else batch.token_types.repeat(count, 1),
        )
        logits = logits_of(self._base.model, repeated, task=self._base.task)
        return [
            float(cross_entropies(part, batch.labels, task=self._base.task).item()) / max(1, batch.count)
            for part in logits.chunk(count)
        ]

    def move(self, seed: int, amount: int) -> None:
        """See `seed_rebuild.RebuiltPosition.move`."""
        self._sums = perturb(self._bank, self._sums, seed, amount)
        self.matrix = self._square()

    def _square(self) -> torch.Tensor:
        square = self._sums.reshape(self._bank.rank, self._bank.rank).astype(np.float32)
        return torch.from_numpy(square).to(self._base.device)

    def _moved_vectors(self, seed: int, amount: int) -> Mapping[int, torch.Tensor]:
        own = {vector.ordinal: getattr(vector.module, vector.name).data for vector in self._vectors}
        copies = {ordinal: torch.empty_like(data) for ordinal, data in own.items()}
        write = rewriter(
            [(ordinal, own[ordinal], copies[ordinal]) for ordinal in own], bank=self._bank, exponent=self._exponent
        )
        write(perturb(self._bank, self._sums, seed, amount))
        return copies


@contextmanager
def with_injected_paths(base: Base, ledger: SeedLedger, trainable: Sequence[int]) -> Iterator[Injected]:
    """Attach the paths to the layers that hold the trainable tensors, inside the block.

    Layers are found by the tensor that they hold, not by name: a head that is tied to the embeddings moves with them.

    Raises:
        ConfigError: if a matrix belongs to a layer of another kind than linear layers and embeddings.
    """
    bank = ledger.bank
    assert isinstance(bank, Kron)
    parameters, entries = dict(base.model.named_parameters()), base.manifest.entries
    quantised = {f"{name}.weight": layer for name, layer in quantised_layers(base.model).items()}
    # Their weights are no parameters: the paths stand beside them all the same.
    coded = [ordinal for ordinal in trainable if entries[ordinal].name in quantised]
    ordinals = {id(parameters[entries[ordinal].name]): ordinal for ordinal in trainable if ordinal not in coded}
    holders: list[tuple[int, str, nn.Module]] = [
        (ordinal, "weight", quantised[entries[ordinal].name]) for ordinal in coded
    ]
    holders += [
        (ordinals[id(parameter)], name, module)
        for module in base.model.modules()
        # Duplicates too: a tied tensor needs a path in every module that holds it.
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in ordinals
    ]
    vectors = [Vector(*holder) for holder in holders if len(entries[holder[0]].shape) < 2]
    state = Injected(base, ledger, bank, vectors)
    # The stack removes every hook, also where attaching one of them fails.
    with ExitStack() as stack:
        for module in {id(vector.module): vector.module for vector in vectors}.values():
            own = [vector for vector in vectors if vector.module is module]
            stack.callback(module.register_forward_hook(swap_vectors(state, own)).remove)
        for ordinal, _, module in holders:
            if len(entries[ordinal].shape) == 2:
                u, v = (
                    torch.from_numpy(side).to(base.device, torch.float32)
                    for side in bank.factors(ordinal, entries[ordinal].shape)
                )
                hook = beside(state, module, u, v, where=entries[ordinal].name)
                stack.callback(module.register_forward_hook(hook).remove)
        yield state


# A forward hook: (module, inputs, output) -> the new output.
Hook = Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]


def beside(state: Injected, module: nn.Module, u: torch.Tensor, v: torch.Tensor, *, where: str) -> Hook:
    """Return the forward hook that adds a matrix's change to the output of its layer."""
    # Subclasses scale what they look up, or look up something else.
    if type(module).forward is nn.Embedding.forward:
        rows = u.T.contiguous()  # (R, p)
        lookup = Path(u, -state.unit * v, by_columns=False)
        return lambda _, inputs, output: add_change(
            state, rows[inputs[0]], lookup, expand_rows(state, output), where=where
        )
    if isinstance(module, nn.Linear) or (isinstance(module, QuantisedLinear) and not module.transposed):
        path = Path(v, -state.unit * u, by_columns=True)
    elif isinstance(module, Conv1D | QuantisedLinear):
        path = Path(u, -state.unit * v, by_columns=False)
    else:
        expected = "matrices of linear layers and embeddings for 'kron'"
        got = f"{where}, of {type_of(module)}"
        raise ConfigError(Fault("method.bank", expected, got, 'use "hadamard", or leave it out of method.trainable'))
    return lambda _, inputs, output: add_change(state, inputs[0].float() @ path.first.T, path, output, where=where)


def expand_rows(state: Injected, output: torch.Tensor) -> torch.Tensor:
    """Return an embedding's output for every row of the batch: position embeddings are looked up once for all rows."""
    return output.expand(state.num_rows, *output.shape[1:]) if len(output) == 1 else output


def add_change(state: Injected, t: torch.Tensor, path: Path, output: torch.Tensor, *, where: str) -> torch.Tensor:
    """Return a layer's output (rows, ..., out) with the change added, given the input's numbers t (rows, ..., p)."""
    if len(t) < len(output):
        t = t.expand(len(output), *t.shape[1:])
    rank, count = len(path.first), len(state.moves)
    check_rows(state, t.shape, where)
    h = t @ (state.matrix.T if path.by_columns else state.matrix)
    for part, source, (seed, amount) in zip(h.chunk(count), t.chunk(count), state.moves, strict=True):
        i, j = divmod(seed, rank)
        target, origin = (i, j) if path.by_columns else (j, i)
        part[..., target] += amount * source[..., origin]
    if output.dtype != torch.float32:
        # The product in float32 first: added in 16 bits, small changes would vanish before they are summed.
        return output + (h @ path.second).to(output.dtype)
    flat = torch.addmm(output.reshape(-1, output.shape[-1]), h.reshape(-1, rank), path.second)
    return flat.view(output.shape)


def check_rows(state: Injected, shape: Sequence[int], where: str) -> None:
    """Raise ClientError unless a layer sees the batch row after row, whole or flattened, so that it can be split."""
    if shape[0] != state.num_rows and not (len(shape) == 2 and shape[0] == state.num_rows * state.num_columns):
        raise ClientError(
            f"{where}: expected a layer that sees the {state.num_rows} rows of the batch; got {shape[0]}; "
            'use bank = "hadamard", or leave it out of method.trainable'
        )


def swap_vectors(state: Injected, vectors: Sequence[Vector]) -> Hook:
    """Return the forward hook that runs a layer on each part of the batch with the part's own vectors."""

    def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        own = {vector.name: getattr(module, vector.name).data for vector in vectors}
        outputs = []
        check_rows(state, inputs[0].shape, type(module).__name__)
        try:
            for part, moved in zip(inputs[0].chunk(len(state.moves)), state.parts, strict=True):
                for vector in vectors:
                    getattr(module, vector.name).data = moved[vector.ordinal]
                # Not the module itself: its hooks would run again.
                outputs.append(module.forward(part))
        finally:
            for name, data in own.items():
                getattr(module, name).data = data
        return torch.cat(outputs)

    return hook
