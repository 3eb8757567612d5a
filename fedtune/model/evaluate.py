"""Scores of a model on examples: loss per token, perplexity, accuracy, and generated answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge


@dataclass(frozen=True)
class EvaluationSettings:
    """When and on how much the global model is scored; the recipe's table `evaluate`."""

    every: Annotated[int, Ge(0)] = 1
    """Rounds between scores of the global model on the test data; 0 scores only before the first and after the last."""
    examples: Annotated[int, Ge(1)] | None = 256
    """Test examples used, the first so many; none uses all."""
    clients: bool = True
    """Also score the global model on each client's held-out examples, before the first round and after the last."""
    client_examples: Annotated[int, Ge(1)] | None = 64
    """Held-out examples per client used for that."""
    batch: Annotated[int, Ge(1)] = 16
    generate: Annotated[int, Ge(0)] = 0
    """Test examples to answer by greedy generation and score with Rouge-L and exact match; 0 is off."""
    new_tokens: Annotated[int, Ge(1)] = 64
    """Longest generated answer."""
    prompt: str | None = None
    """Text to continue before and after the run, shown at its end."""
