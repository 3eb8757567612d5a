"""Directions of the kron bank added in the forward pass: no weight is rewritten, and all losses share one batch.

For a stored matrix (R, C) the change -u U^T M V is a low-rank path beside the layer, p numbers wide; a perturbation
along z_k, k = i p + j, adds a multiple of one of these p numbers to another of them. So the base may be shared,
read-only, or of a number format that cannot hold small steps.

Shapes: p is the bank's rank, p * p = K; U is (p, R), V is (p, C), M holds the accumulators as (p, p); u = 2^-e. After
a redraw there are several banks: their rows stand below each other, p of each, and M is their blocks on a diagonal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import isqrt
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.directions.bank import DirectionBank, perturb
from fedtune.directions.kron import Kron
from fedtune.directions.rebuild_torch import rewriter
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.space import Grouped, plain_banks, summands
from fedtune.errors import ClientError, ConfigError, Fault, type_of
from fedtune.model.base import Base
from fedtune.model.batches import Batch
from fedtune.model.loss import cross_entropies, logits_of
from fedtune.model.quantised_layers import quantised_layers
from fedtune.model.quantised_linear import QuantisedLinear
from fedtune.probing.steps import Move
from fedtune.tensors import Array


@dataclass(frozen=True)
class Path:
    """The low-rank path beside one layer, from p numbers t of its input to p numbers h of its output."""

    ordinal: int
    first: torch.Tensor
    """(p, in), float32."""
    second: torch.Tensor
    """(p, out), float32, already times -u, which is exact for a power of two."""
    by_columns: bool
    """Whether t belongs to the columns of M, h = t M^T, as in nn.Linear; else to its rows, h = t M."""
    where: str
    """The matrix's name."""

    def through(self, t: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        """Return h of t (..., p), given M."""
        return t @ (matrix.T if self.by_columns else matrix)


@dataclass(frozen=True)
class Holder:
    """A trainable tensor and a module that holds it."""

    ordinal: int
    name: str
    """Within the module."""
    module: nn.Module


class Change(Protocol):
    """What is added beside the layers."""

    def rows(self, output: torch.Tensor) -> torch.Tensor:
        """Return an embedding's output for every row of the batch."""
        ...

    def add(self, t: torch.Tensor, path: Path, output: torch.Tensor) -> torch.Tensor:
        """Return a layer's output (rows, ..., out) with the change added, given t (rows, ..., p) of its input."""
        ...


class Injected:
    """Losses at w(A) and around it, by one forward pass over the batch repeated once for each loss."""

    def __init__(self, base: Base, ledger: SeedLedger, holders: Sequence[Holder]) -> None:
        self._base, self._bank, self._exponent = base, ledger.bank, ledger.exponent
        entries = base.manifest.entries
        self._matrices = sorted({each.ordinal for each in holders if len(entries[each.ordinal].shape) == 2})
        self._vectors = [each for each in holders if len(entries[each.ordinal].shape) < 2]
        self._sums = np.array(ledger.accumulators)
        self._squares = self._make_squares()
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
        self._squares = self._make_squares()

    def rows(self, output: torch.Tensor) -> torch.Tensor:
        """See `Change.rows`: position embeddings are looked up once for all rows."""
        return output.expand(self.num_rows, *output.shape[1:]) if len(output) == 1 else output

    def add(self, t: torch.Tensor, path: Path, output: torch.Tensor) -> torch.Tensor:
        """See `Change.add`; every move's share of the rows has its own M."""
        if len(t) < len(output):
            t = t.expand(len(output), *t.shape[1:])
        check_rows(self, t.shape, path.where)
        count, banks = len(self.moves), plain_banks(self._bank)
        h = path.through(t, self._squares[path.ordinal])
        rank = len(path.first) // len(banks)
        newest = rank * (len(banks) - 1)  # the place of its first row among those of all banks
        for part, source, (seed, amount) in zip(h.chunk(count), t.chunk(count), self.moves, strict=True):
            i, j = divmod(seed, rank)
            target, origin = (i, j) if path.by_columns else (j, i)
            part[..., newest + target] += amount * source[..., newest + origin]
        return add_product(output, h, path)

    def _make_squares(self) -> Mapping[int, torch.Tensor]:
        blocks = squares(self._bank, self._sums, self._matrices, self._base.device)
        whole = {id(own): torch.block_diag(*own) for own in blocks.values()}
        return {ordinal: whole[id(own)] for ordinal, own in blocks.items()}

    def _moved_vectors(self, seed: int, amount: int) -> Mapping[int, torch.Tensor]:
        own = {vector.ordinal: getattr(vector.module, vector.name).data for vector in self._vectors}
        copies = {ordinal: torch.empty_like(data) for ordinal, data in own.items()}
        write = rewriter(
            [(ordinal, own[ordinal], copies[ordinal]) for ordinal in own], bank=self._bank, exponent=self._exponent
        )
        write(perturb(self._bank, self._sums, seed, amount))
        return copies


def squares(
    bank: DirectionBank, accumulators: Array, ordinals: Sequence[int], device: torch.device
) -> Mapping[int, Sequence[torch.Tensor]]:
    """Return M of each matrix for each bank, oldest first: float32 (p, p); one sequence where matrices share them."""
    side, apart = isqrt(bank.seeds), has_own_numbers(bank)
    blocks = dict[int, Sequence[torch.Tensor]]()
    for ordinal in ordinals:
        if blocks and not apart:
            blocks[ordinal] = next(iter(blocks.values()))
            continue
        parts = [sums.reshape(side, side).astype(np.float32) for _, sums in summands(bank, accumulators, ordinal)]
        blocks[ordinal] = [torch.from_numpy(part).to(device) for part in parts]
    return blocks


def has_own_numbers(bank: DirectionBank) -> TypeGuard[Grouped]:
    """Return whether every tensor has numbers of its own."""
    return isinstance(bank, Grouped) and bank.groups == "tensor"


def add_product(output: torch.Tensor, h: torch.Tensor, path: Path) -> torch.Tensor:
    """Return a layer's output with the path's added, given h (rows, ..., p)."""
    if output.dtype != torch.float32:
        # The product in float32 first: added in 16 bits, small changes would vanish before they are summed.
        return output + (h @ path.second).to(output.dtype)
    flat = torch.addmm(output.reshape(-1, output.shape[-1]), h.reshape(-1, len(path.first)), path.second)
    return flat.view(output.shape)


@contextmanager
def with_injected_paths(base: Base, ledger: SeedLedger, trainable: Sequence[int]) -> Iterator[Injected]:
    """Attach the paths to the layers that hold the trainable tensors, inside the block.

    Raises:
        ConfigError: if a matrix belongs to a layer of another kind than linear layers and embeddings.
    """
    holders, entries = holders_of(base, trainable), base.manifest.entries
    vectors = [each for each in holders if len(entries[each.ordinal].shape) < 2]
    state = Injected(base, ledger, holders)
    # The stack removes every hook, also where attaching one of them fails.
    with ExitStack() as stack:
        for module in {id(vector.module): vector.module for vector in vectors}.values():
            own = [vector for vector in vectors if vector.module is module]
            stack.callback(module.register_forward_hook(swap_vectors(state, own)).remove)
        stack.enter_context(with_paths(base, ledger, holders, state))
        yield state


def holders_of(base: Base, trainable: Sequence[int]) -> Sequence[Holder]:
    """Return every module that holds one of the tensors, those that hold codes alone first.

    By the tensor that they hold, not by name: a head that is tied to the embeddings moves with them.
    """
    parameters, entries = dict(base.model.named_parameters()), base.manifest.entries
    quantised = {f"{name}.weight": layer for name, layer in quantised_layers(base.model).items()}
    # Their weights are no parameters: the paths stand beside them all the same.
    coded = [ordinal for ordinal in trainable if entries[ordinal].name in quantised]
    ordinals = {id(parameters[entries[ordinal].name]): ordinal for ordinal in trainable if ordinal not in coded}
    return [Holder(ordinal, "weight", quantised[entries[ordinal].name]) for ordinal in coded] + [
        Holder(ordinals[id(parameter)], name, module)
        for module in base.model.modules()
        # Duplicates too: a tied tensor needs a path in every module that holds it.
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False)
        if id(parameter) in ordinals
    ]


@contextmanager
def with_paths(base: Base, ledger: SeedLedger, holders: Sequence[Holder], change: Change) -> Iterator[None]:
    """Let every layer that holds one of the matrices give out its output with a change added, inside the block.

    Raises:
        ConfigError: if a matrix belongs to a layer of another kind than linear layers and embeddings.
    """
    entries, unit = base.manifest.entries, 2.0**-ledger.exponent
    with ExitStack() as stack:
        for holder in holders:
            entry = entries[holder.ordinal]
            if len(entry.shape) == 2:
                u, v = (side.to(base.device) for side in factors(ledger.bank, holder.ordinal, entry.shape))
                hook = beside(change, holder, u, v, unit=unit, where=entry.name)
                stack.callback(holder.module.register_forward_hook(hook).remove)
        yield


def factors(bank: DirectionBank, ordinal: int, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return U (p, R) and V (p, C) of all banks of kron, one below the other, float32."""
    own = [each.factors(ordinal, shape) for each in plain_banks(bank) if isinstance(each, Kron)]
    u, v = (torch.from_numpy(np.concatenate(sides)).float() for sides in zip(*own, strict=True))
    return u, v


# A forward hook: (module, inputs, output) -> the new output.
Hook = Callable[[nn.Module, Any, torch.Tensor], torch.Tensor]


def beside(change: Change, holder: Holder, u: torch.Tensor, v: torch.Tensor, *, unit: float, where: str) -> Hook:
    """Return the forward hook that adds a matrix's change to the output of its layer."""
    module = holder.module
    # Subclasses scale what they look up, or look up something else.
    if type(module).forward is nn.Embedding.forward:
        rows = u.T.contiguous()  # (R, p)
        lookup = Path(holder.ordinal, u, -unit * v, by_columns=False, where=where)
        return lambda _, inputs, output: change.add(rows[inputs[0]], lookup, change.rows(output))
    if isinstance(module, nn.Linear) or (isinstance(module, QuantisedLinear) and not module.transposed):
        path = Path(holder.ordinal, v, -unit * u, by_columns=True, where=where)
    elif isinstance(module, Conv1D | QuantisedLinear):
        path = Path(holder.ordinal, u, -unit * v, by_columns=False, where=where)
    else:
        expected = "matrices of linear layers and embeddings for 'kron'"
        got = f"{where}, of {type_of(module)}"
        raise ConfigError(Fault("method.bank", expected, got, 'use "hadamard", or leave it out of method.trainable'))
    return lambda _, inputs, output: change.add(inputs[0].float() @ path.first.T, path, output)


def check_rows(state: Injected, shape: Sequence[int], where: str) -> None:
    """Raise ClientError unless a layer sees the batch row after row, whole or flattened, so that it can be split."""
    if shape[0] != state.num_rows and not (len(shape) == 2 and shape[0] == state.num_rows * state.num_columns):
        raise ClientError(
            f"{where}: expected a layer that sees the {state.num_rows} rows of the batch; got {shape[0]}; "
            'use bank = "hadamard", or leave it out of method.trainable'
        )


def swap_vectors(state: Injected, vectors: Sequence[Holder]) -> Hook:
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
