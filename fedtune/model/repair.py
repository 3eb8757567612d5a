"""Layers of a pruned model with weights that make up for what was taken out; see `pruning.least_squares`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.pruning.least_squares import RIDGE, check_moments, input_widths
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import BlockLayout, LayerSlice
from fedtune.tensors import Tensors


@dataclass(frozen=True, eq=False)
class Repair:
    """What a structure of a base is repaired by: a function of base, structure and moments alone."""

    moments: Tensors
    """As `check_moments` has found them."""
    whole: Mapping[str, tuple[torch.Tensor, torch.Tensor | None]]
    """The base's own weight and bias, by layer; nothing is written to them."""

    def parameters(self, name: str, cut: LayerSlice) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return (weight, bias) of a layer at a structure, in the weight's number format; None if it is not repaired.

        A layer that loses nothing, and one that reads neither heads nor channels, is not.
        """
        if name not in self.whole or cut.into is None:
            return None
        weight, bias = self.whole[name]
        return repair_layer(weight, bias, layer_moments(self.moments, name), cut.into)


def repair_of(model: Any, moments: Tensors, settings: PruningSettings, layout: BlockLayout) -> Repair | None:
    """Return by what a whole model's structures are repaired; None without moments.

    Raises:
        ShapeError: if the moments are not of this base.
    """
    if settings.repair == "none" or not moments:
        return None
    check_moments(moments, settings, layout)
    whole = {}
    for name in input_widths(layout):
        module = model.get_submodule(name)
        # (out, in), in GPT-2 a view of the (in, out) that it stores.
        weight = module.weight.detach()
        bias = None if module.bias is None else module.bias.detach()
        whole[name] = (weight.T if isinstance(module, Conv1D) else weight, bias)
    return Repair(moments, whole)


def layer_moments(moments: Tensors, name: str) -> Tensors:
    return {side: moments[key] for side in ("mean", "deviation", "u") if (key := f"{name}.{side}") in moments}


def repair_layer(
    weight: torch.Tensor, bias: torch.Tensor | None, moments: Tensors, kept: np.ndarray[Any, Any]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a layer's weight (out, kept) and bias (out,) after its other columns are gone; None if there are none.

    Args:
        weight: (out, n) of the whole layer.
        bias: (out,) or None.
        moments: of its input.
        kept: the columns that stay, rising.
    """
    n = weight.shape[1]
    if len(kept) == n:
        return None
    rest = np.setdiff1d(np.arange(n), kept)
    at, off = (torch.from_numpy(part).to(weight.device) for part in (kept, rest))
    # In float64 and by torch, whose threads are the client's setting; rounded once, to the weight's format.
    lost = weight.index_select(1, off).double()
    own = weight.index_select(1, at).double()
    sides = {name: torch.from_numpy(np.array(part, np.float64)).to(weight.device) for name, part in moments.items()}
    mean = sides["mean"]
    shift = lost @ mean[off]
    if "u" in sides:
        left, right = operator(sides["u"], sides["deviation"], at, off)
        added = (lost @ left) @ right
        own, shift = own + added, shift - added @ mean[at]
    if bias is not None:
        shift = shift + bias.double()
    return own.to(weight.dtype), shift.to(weight.dtype)


def operator(
    u: torch.Tensor, deviation: torch.Tensor, kept: torch.Tensor, rest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return M = C_rk (C_kk + ridge)^-1 as two factors, (rest, r) and (r, kept), of C = u u^T + diag(deviation^2).

    By U_r (I + U_k^T D^-1 U_k)^-1 U_k^T D^-1, D = diag(deviation_k^2) + ridge: of r equations in place of `kept`.
    """
    mine = u[kept]  # (kept, r)
    own = deviation[kept].square()
    ridge = RIDGE * (mine.square().sum(dim=1) + own).mean()
    if ridge == 0:  # inputs that are constant say nothing of others
        return u[rest], torch.zeros_like(mine.T)
    scaled = mine / (own + ridge)[:, None]
    core = torch.eye(u.shape[1], dtype=u.dtype, device=u.device) + mine.T @ scaled
    return u[rest], torch.cholesky_solve(scaled.T, torch.linalg.cholesky(core))


def put_repaired(module: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Write a repaired weight and bias into a layer that was cut, in place; a layer without a bias gets one."""
    with torch.no_grad():
        module.weight.copy_(weight.T if isinstance(module, Conv1D) else weight)
    module.bias = nn.Parameter(bias, requires_grad=False)
