"""A frozen change added to a second copy of a layer's weight, which the layer reads in place of its own for a while."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ShapeError
from fedtune.lora.adapter import Factors
from fedtune.model.base import to_torch
from fedtune.model.lora_layer import FrozenParts
from fedtune.tensors import Array

FrozenChange: TypeAlias = Mapping[str, Factors | Array]
"""Changes by full name of a module: factors, or dense (out, in)."""

SLIGHT = 64
"""Factors that cost less than one in so many of their layer's operations multiply beside it: no copy is worth that."""

OWN = "own_weight"
"""Attribute of a layer that reads another weight: its own one, no parameter of the model meanwhile."""


@dataclass(frozen=True, eq=False)
class ChangedWeight:
    """A layer's weight with a change added to it, and what it is the sum of."""

    weight: nn.Parameter
    own: nn.Parameter
    numbers: torch.Tensor
    """What `own` held: its tensor can be exchanged. Held on to, so that no other tensor gets its place in memory."""
    version: int
    """Of `own`: grows when it is written to in place."""
    change: Factors | None
    """None where it was dense: holding on to it would be a third copy of the layer."""
    threads: int
    """On which the product was computed: another number may give other last bits."""

    def holds(self, own: nn.Parameter, change: Factors | Array) -> bool:
        """Return whether this is the sum of just these."""
        return (
            self.own is own
            and self.numbers.data_ptr() == own.data_ptr()
            and self.version == own._version
            and self.threads == torch.get_num_threads()
            and self.change is not None
            and isinstance(change, Factors)
            and same(self.change.a, change.a)
            and same(self.change.b, change.b)
        )


def same(one: Array, other: Array) -> bool:
    return one is other or np.array_equal(one, other)


def is_exact(module: nn.Module, *, half: bool) -> bool:
    """Return whether a layer's weight can take a change: it is not quantised, and its products are of 32 bits or more.

    In 16 bits W + change would round to W wherever the change is below a 512th of W (an element of bfloat16), which is
    most of the first rounds' training. `half` says that products are rounded to 16 bits though the weight is not.
    """
    weight = module._parameters.get("weight")
    # A quantised layer multiplies in a way of its own.
    plain = isinstance(module, Conv1D) or (isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward)
    return plain and not half and weight is not None and weight.dtype in (torch.float32, torch.float64)


def is_slight(change: Factors | Array) -> bool:
    """Return whether a change costs so little beside its layer that a copy of the weight would be memory for nothing.

    As rank 32 does at 4096 x 4096, where the copy would be 67 MB a layer.
    """
    return isinstance(change, Factors) and SLIGHT * change.rank * sum(change.shape) <= change.shape[0] * change.shape[1]


def change_weight(module: nn.Module, change: Factors | Array, before: ChangedWeight | None) -> ChangedWeight:
    """Return a layer's weight plus a change, rounded once; the layer itself stays as it is.

    Args:
        module: a linear layer of transformers or torch.
        change: of (out, in).
        before: a sum of an earlier round, which is returned if it is the same, and overwritten if it is another.
    """
    own = module.weight
    assert isinstance(own, nn.Parameter)
    if before is not None and before.holds(own, change):
        return before
    # Written over the last round's, so that there is never more than one copy.
    fits = before is not None and (before.weight.shape, before.weight.dtype) == (own.shape, own.dtype)
    transposed = isinstance(module, Conv1D)
    # Also where the caller only evaluates: the clients that share the copy train through it.
    with torch.inference_mode(False), torch.no_grad():
        target = before.weight.data if before is not None and fits else torch.empty_like(own)
        if isinstance(change, Factors):
            a, b = (to_torch(factor, own.device).to(own.dtype) for factor in (change.a, change.b))
            left, right = (a.T, b.T) if transposed else (b, a)
            torch.addmm(own, left, right, out=target)
        else:
            dense = to_torch(change, own.device).to(own.dtype)
            torch.add(own, dense.T if transposed else dense, out=target)
        weight = nn.Parameter(target, requires_grad=False)
    factors = change if isinstance(change, Factors) else None
    return ChangedWeight(weight, own, own.data, own._version, factors, torch.get_num_threads())


def put(module: Any, changed: ChangedWeight) -> None:
    """Let a layer read a changed weight."""
    set_own_weight(module, changed.own)
    module.weight = changed.weight


def read_weights(module: Any) -> tuple[nn.Parameter, nn.Parameter | None]:
    """Return the weight that a layer reads, and its own one if that is another."""
    return module.weight, own_weight(module) if is_changed(module) else None


def restore(module: Any, before: tuple[nn.Parameter, nn.Parameter | None]) -> None:
    """Let a layer read the weight again that it read when `read_weights` returned this."""
    weight, own = before
    if own is None:
        # Where a pruned model has shrunk meanwhile, the smaller one; where `put` was interrupted, maybe none.
        module.weight = vars(module).pop(OWN, weight)
    else:
        module.weight = weight
        set_own_weight(module, own)


def set_own_weight(module: Any, weight: nn.Parameter) -> None:
    """Write the weight that a layer will read when it reads its own again."""
    vars(module)[OWN] = weight  # not by setattr, which would make it a parameter of the model


def is_changed(module: Any) -> bool:
    """Return whether a layer reads another weight than its own."""
    return OWN in vars(module)


def own_weight(module: Any) -> nn.Parameter:
    """Return a layer's weight without any frozen change."""
    weight: nn.Parameter = vars(module).get(OWN, module.weight)
    return weight


def beside(change: Factors | Array, device: torch.device) -> FrozenParts:
    """Return a frozen change as matrices to multiply by beside a layer's own weight, the cheaper way.

    Factors in float32. A dense change in bfloat16, whatever the layer's format: it costs as much as the layer does, and
    its own digits are rounded, not those of its sum with the weight. In float16 a small change would underflow.
    """
    if isinstance(change, Factors):
        (m, n), rank = change.shape, change.rank
        if 2 * rank * (m + n) < m * n:
            return to_torch(change.a, device), to_torch(change.b, device)
        return ((to_torch(change.b, device) @ to_torch(change.a, device)).to(torch.bfloat16),)
    return (to_torch(change, device).to(torch.bfloat16),)


def check_dense(name: str, dense: Array) -> Array:
    """Return a dense change.

    Raises:
        ShapeError: if it has other than two axes.
    """
    if dense.ndim != 2:
        raise ShapeError(f"{name}.w: expected (out, in); got {dense.shape}")
    return dense
