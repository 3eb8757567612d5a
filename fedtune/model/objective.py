"""The terms of a client's objective beside the loss on its examples: what pulls the training in another direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from math import floor
from typing import Any, TypeAlias

import torch
from torch import nn

from fedtune.lora.adapter import Adapter, Factors
from fedtune.messages import Proximal, TailRank, Term
from fedtune.model.lora import layers

Start: TypeAlias = MutableMapping[nn.Parameter, torch.Tensor]
"""Values at the start of the training by trained parameter; where a model shrinks, these shrink with it."""


def tail_rank(model: nn.Module, start: Start, term: TailRank) -> torch.Tensor:
    """Return weight * sum over modules of ||B[:, g:]|| ||A[g:, :]||, g = decay * rank (HetLoRA, arXiv 2401.06432)."""
    return term.weight * tail_norm(model, term.decay)


def tail_norm(model: nn.Module, decay: float) -> torch.Tensor:
    """Return the size of what cutting the local adapter to decay * rank would remove."""
    norms = []
    for layer in layers(model, "local").values():
        a, b = layer.lora_A["local"].weight, layer.lora_B["local"].weight  # (rank, in), (out, rank)
        rank = kept_rank(a.shape[0], decay)
        # The small number keeps the gradient of a norm finite at zero.
        norms.append((b[:, rank:].square().sum() + 1e-12).sqrt() * (a[rank:].square().sum() + 1e-12).sqrt())
    return torch.stack(norms).sum()


def tail_size(model: nn.Module, terms: Sequence[Term]) -> float:
    """Return the same for the tail that these terms pull on; 0 if none does."""
    return sum(tail_norm(model, term.decay).item() for term in terms if isinstance(term, TailRank))


def cut_tail(adapter: Adapter, terms: Sequence[Term]) -> Adapter:
    """Return an adapter without the tail that these terms pull on."""
    decay = next(term.decay for term in terms if isinstance(term, TailRank))
    ranks = {module: kept_rank(factors.rank, decay) for module, factors in adapter.items()}
    return {module: Factors(a=f.a[: ranks[module]], b=f.b[:, : ranks[module]]) for module, f in adapter.items()}


def kept_rank(rank: int, decay: float) -> int:
    """Return the rank that is left when a client of HetLoRA cuts its factors."""
    return max(1, floor(decay * rank))


def proximal(model: nn.Module, start: Start, term: Proximal) -> torch.Tensor:
    """Return mu / 2 * ||w - w_start||^2 over all that is trained (FedProx, arXiv 1812.06127, equation 2)."""
    distances = [(parameter - value).square().sum() for parameter, value in start.items()]
    return term.mu / 2 * torch.stack(distances).sum()


TERMS: Mapping[type[Term], Callable[[nn.Module, Start, Any], torch.Tensor]] = {
    TailRank: tail_rank,
    Proximal: proximal,
}
"""(model with its adapters, values at the start, the term) -> a loss, by kind of term."""
