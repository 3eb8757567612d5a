"""The trainable adapters of several clients on one base at once: each row of a batch meets its own client's factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fedtune.lora.adapter import Adapter, Factors
from fedtune.model.base import Base, to_numpy, to_torch
from fedtune.tensors import Array


class UnbatchableError(Exception):
    """Clients cannot be trained in one forward pass: the text says why, and one after the other they can."""


@dataclass(frozen=True)
class Stack:
    """The adapters of one layer, of all clients, padded with zeros to the largest rank among them.

    What is padded stays zero: the gradient of a row of A is made of a column of B, and that of the column of the row.
    """

    a: nn.Parameter
    """(clients, rank, in)"""
    b: nn.Parameter
    """(clients, out, rank)"""
    scales: torch.Tensor
    """(clients, 1, 1), alpha / rank of each."""

    def change(self, inputs: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
        """Return a layer's output (clients * batch, time, out) with what the adapters add to it."""
        grouped = inputs.to(self.a.dtype).reshape(len(self.a), -1, inputs.shape[-1])
        added = torch.bmm(torch.bmm(grouped, self.a.mT), self.b.mT) * self.scales
        return (output + added.view_as(output)).to(output.dtype)


@contextmanager
def with_stacks(
    base: Base, adapters: Sequence[Adapter], *, scales: Sequence[float], rows: int, train: str
) -> Iterator[Mapping[str, Stack]]:
    """Attach one adapter per client to the base inside the block; the rows of a batch are theirs in equal shares.

    Args:
        base: the resident base, with what all clients received attached to it.
        adapters: by client, over the same modules.
        scales: alpha / rank, by client.
        rows: of every batch that goes forward inside the block.
        train: factors that get gradients, `ab` or `b`.

    Raises:
        UnbatchableError: in a forward pass, from a layer that sees other rows than those of the batch.
    """
    stacks = {name: stack_of([adapter[name] for adapter in adapters], scales, base, train) for name in adapters[0]}
    handles = [
        base.model.get_submodule(name).register_forward_hook(adding(name, stack, rows))
        for name, stack in stacks.items()
    ]
    try:
        yield stacks
    finally:
        remove(handles)


def adding(name: str, stack: Stack, rows: int) -> Any:
    """Return the forward hook of one layer."""

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        # The caller sees to it that no batch is as long as it has rows: a layer that puts time first is noticed here.
        if inputs[0].dim() != 3 or inputs[0].shape[0] != rows:
            got = tuple(inputs[0].shape)
            raise UnbatchableError(f"{name}: expected an input of ({rows} rows, time, channels); got {got}")
        return stack.change(inputs[0], output)

    return hook


def remove(handles: Sequence[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def stack_of(factors: Sequence[Factors], scales: Sequence[float], base: Base, train: str) -> Stack:
    rank = max(pair.rank for pair in factors)
    a = np.stack([pad_factor(pair.a, rank, axis=0) for pair in factors])
    b = np.stack([pad_factor(pair.b, rank, axis=1) for pair in factors])
    return Stack(
        nn.Parameter(to_torch(a, base.device), requires_grad="a" in train),
        nn.Parameter(to_torch(b, base.device), requires_grad="b" in train),
        torch.tensor(scales, dtype=torch.float32).view(-1, 1, 1).to(base.device),
    )


def pad_factor(factor: Array, rank: int, *, axis: int) -> Array:
    """Return a factor with zeros added up to a rank."""
    missing = [(0, rank - factor.shape[axis] if axis == at else 0) for at in range(2)]
    return np.pad(np.asarray(factor, np.float32), missing)


def unstack(stacks: Mapping[str, Stack], adapters: Sequence[Adapter]) -> Sequence[Adapter]:
    """Return each client's adapter again, at the ranks that it had in `adapters`, of which the stacks were made."""
    arrays = {name: (to_numpy(stack.a), to_numpy(stack.b)) for name, stack in stacks.items()}
    return [
        {
            name: Factors(a=a[place, : own[name].rank].copy(), b=b[place, :, : own[name].rank].copy())
            for name, (a, b) in arrays.items()
        }
        for place, own in enumerate(adapters)
    ]
