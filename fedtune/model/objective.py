"""The terms of a client's objective beside the loss on its examples: what pulls the training in another direction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from math import floor
from typing import Any, TypeAlias

import torch
from torch import nn

from fedtune.lora.adapter import Adapter, Factors
from fedtune.messages import Preference, Proximal, TailRank, Term
from fedtune.model.lora import layers

Start: TypeAlias = MutableMapping[nn.Parameter, torch.Tensor]
"""Values at the start of the training by trained parameter; where a model shrinks, these shrink with it."""


Pairs: TypeAlias = Sequence[tuple[nn.Parameter, nn.Parameter]]
"""Factors a (rank, in) and b (out, rank) of each layer with a trained adapter."""


def factor_pairs(model: nn.Module) -> Pairs:
    """Return the trained factors of a model with fedtune's own layers."""
    return [(layer.a, layer.b) for layer in layers(model).values()]


def tail_rank(pairs: Pairs, start: Start, term: TailRank) -> torch.Tensor:
    """Return weight * sum over modules of ||B[:, g:]|| ||A[g:, :]||, g = decay * rank (HetLoRA, arXiv 2401.06432)."""
    return term.weight * tail_norm(pairs, term.decay)


def tail_norm(pairs: Pairs, decay: float) -> torch.Tensor:
    """Return the size of what cutting the local adapter to decay * rank would remove."""
    norms = []
    for a, b in pairs:
        rank = kept_rank(a.shape[0], decay)
        # The small number keeps the gradient of a norm finite at zero.
        norms.append((b[:, rank:].square().sum() + 1e-12).sqrt() * (a[rank:].square().sum() + 1e-12).sqrt())
    return torch.stack(norms).sum()


def kept_rank(rank: int, decay: float) -> int:
    """Return the rank that is left when a client of HetLoRA cuts its factors."""
    return max(1, floor(decay * rank))


def proximal(pairs: Pairs, start: Start, term: Proximal) -> torch.Tensor:
    """Return mu / 2 * ||w - w_start||^2 over all that is trained (FedProx, arXiv 1812.06127, equation 2)."""
    distances = [(parameter - value).square().sum() for parameter, value in start.items()]
    return term.mu / 2 * torch.stack(distances).sum()


TERMS: Mapping[type[Term], Callable[[Pairs, Start, Any], torch.Tensor]] = {
    TailRank: tail_rank,
    Proximal: proximal,
}
"""(factors of each layer, values at the start, the term) -> a loss, by kind of term."""


Between: TypeAlias = Callable[[int, torch.optim.Optimizer, Start], object]
"""(steps taken, optimizer, values at the start): what happens between two steps, such as making the model smaller."""


class Hooks:
    """What a training run does beside plain steps on the examples' loss: terms, importance, a model that shrinks."""

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[Term] = (),
        *,
        between: Between | None = None,
        weigh: bool = False,
        measure: Callable[[nn.Module], Any] | None = None,
        anchor: Start | None = None,
        pairs: Callable[[nn.Module], Pairs] = factor_pairs,
    ) -> None:
        self.at_end: Any = None
        """What `measure` returned for the trained model, its adapters still attached."""
        self.importance = 0.0
        """Sum over the steps of the sum of |parameter * gradient|; only where it is weighed."""
        self._pairs = pairs
        self._model, self._between, self._weigh, self._measure = model, between, weigh, measure
        # HetLoRA's term of weight 0 is no part of the loss, and no rank is ever cut.
        # The preference of answers is the loss on the examples itself, in place of their likelihood; see `loss`.
        self.terms = [
            term
            for term in terms
            if not isinstance(term, Preference) and not (isinstance(term, TailRank) and term.weight == 0)
        ]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        distant = any(isinstance(term, Proximal) for term in self.terms)
        # Only for FedProx, which alone compares with the start: the copy is as large as all that is trained. A personal
        # model is pulled towards other values than those that it starts from.
        start = {parameter: parameter.detach().clone() for parameter in trained} if distant and not anchor else {}
        self._start: Start = anchor or start
        self._tail = self._tail_size()

    def after_backward(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the terms' gradients to those of the examples' loss, before they are clipped."""
        for term in self.terms:
            TERMS[type(term)](self._pairs(self._model), self._start, term).backward()

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Weigh the gradients of a step that will be taken, before they are clipped."""
        if self._weigh:
            self.importance += importance(optimizer.param_groups[0]["params"])

    def after_step(self, steps: int, optimizer: torch.optim.Optimizer) -> None:
        """Do what is due between two steps; so many have been taken."""
        if self._between is not None:
            self._between(steps, optimizer, self._start)

    def after_training(self, adapter: Adapter) -> Adapter:
        """Return the trained adapter, without its tail if the training has made that smaller (HetLoRA); measure."""
        if self._measure is not None:
            self.at_end = self._measure(self._model)
        decays = [term.decay for term in self.terms if isinstance(term, TailRank)]
        if not decays or self._tail_size() >= self._tail:
            return adapter
        ranks = {module: kept_rank(factors.rank, decays[0]) for module, factors in adapter.items()}
        return {module: Factors(a=f.a[: ranks[module]], b=f.b[:, : ranks[module]]) for module, f in adapter.items()}

    def _tail_size(self) -> float:
        tails = [term for term in self.terms if isinstance(term, TailRank)]
        return sum(tail_norm(self._pairs(self._model), term.decay).item() for term in tails)


def importance(parameters: Sequence[nn.Parameter]) -> float:
    """Return the sum of |parameter * gradient|."""
    products = [(p.detach() * p.grad).abs().sum() for p in parameters if p.grad is not None]
    return float(torch.stack(products).sum()) if products else 0.0
