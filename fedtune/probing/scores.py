"""Scores of a causal model that follow from its loss, whatever computes it, and the batches that are scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from fedtune.data.encode import Example
from fedtune.probing.measure import B, Position

Metrics: TypeAlias = Mapping[str, float]


def by_length(examples: Sequence[Example], batch: int) -> Sequence[Sequence[int]]:
    """Return batches of places in `examples`, those of similar length together, so that little is padded."""
    # Ties by place: the batches, and with them the last bits of a sum, must not depend on the sorting.
    by_size = sorted(range(len(examples)), key=lambda i: (len(examples[i].input_ids), i))
    return [by_size[begin : begin + batch] for begin in range(0, len(by_size), batch)]


def likelihood_scores(total: float, tokens: int, examples: Sequence[Example]) -> Metrics:
    """Return loss, perplexity and bits per character of examples with a summed loss over the tokens that count."""
    characters = sum(example.characters for example in examples)
    loss = total / max(1, tokens)
    return {
        "loss": loss,
        # e^710 is beyond a float.
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_character": total / math.log(2) / max(1, characters),
        "tokens": tokens,
        "examples": len(examples),
    }


def likelihood_at(
    position: Position[B], collate: Callable[[Sequence[Example]], B], examples: Sequence[Example], *, batch: int
) -> Metrics:
    """Return the scores of a causal model at a position of its weights; see `likelihood_scores`."""
    total, tokens = 0.0, 0
    for places in by_length(examples, batch):
        rows = collate([examples[place] for place in places])
        [mean] = position.losses(rows, [(0, 0)])  # an amount of 0 stays where it is, whatever the seed
        total, tokens = total + mean * rows.count, tokens + rows.count
    return likelihood_scores(total, tokens, examples)
