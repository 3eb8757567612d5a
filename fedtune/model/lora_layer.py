"""A linear layer with low-rank changes beside it: the factors that a client trains, and what is frozen in 16 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout, linear

from fedtune.model.targets import linear_shape

FrozenParts = tuple[torch.Tensor, ...]
"""Matrices of a frozen change, applied one after the other: (out, in), or (rank, in) and (out, rank)."""


@dataclass(frozen=True, eq=False)
class Trainable:
    """The factors that are trained in one layer."""

    a: nn.Parameter
    """(rank, in)"""
    b: nn.Parameter
    """(out, rank), without the scale"""
    scale: float
    dropout: float = 0.0
    """On the input."""


class LoraLayer(nn.Module):
    """Gives what its linear layer gives, plus frozen @ x, plus scale * b @ (a @ dropout(x)).

    The arithmetic is that of peft's layer, to the last bit where the scale is a power of two: the scale is applied to
    `a @ x`, which is as wide as the rank, and not to the output. It takes the place of any layer that multiplies by a
    matrix, quantised ones included, because it only calls it.
    """

    def __init__(self, base_layer: nn.Module, trainable: Trainable | None, frozen: FrozenParts = ()) -> None:
        super().__init__()
        self.base_layer: Any = base_layer
        # Parameters, or None where nothing is trained; of any type, because most callers have asked before.
        self.a: Any = trainable.a if trainable else None
        self.b: Any = trainable.b if trainable else None
        self.scale, self.dropout = (trainable.scale, trainable.dropout) if trainable else (1.0, 0.0)
        self.frozen = frozen
        # Without dropout until it is asked for, as the base around it.
        self.training = False

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the layer's output for x (..., in), in the number format of the layer beneath."""
        result = self.base_layer(x, *args, **kwargs)
        given = result.dtype
        if self.frozen:
            change = x.to(self.frozen[0].dtype)
            for matrix in self.frozen:
                change = linear(change, matrix)
            result = result + change
        if self.a is not None:
            x = x.to(self.a.dtype)
            if self.training and self.dropout:
                x = dropout(x, self.dropout)
            result = result + linear(linear(x, self.a) * self.scale, self.b)
        output: torch.Tensor = result.to(given)
        return output

    # Some models ask a layer for these, such as T5 for the format of its output projection.
    @property
    def weight(self) -> Any:
        """The weight of the layer beneath, without the changes beside it."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias

    @property
    def out_features(self) -> int:
        return (linear_shape(self.base_layer) or (0, 0))[0]

    @property
    def in_features(self) -> int:
        return (linear_shape(self.base_layer) or (0, 0))[1]
