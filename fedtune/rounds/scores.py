"""Scores of one model on several clients' data: pooled into those of all of it, and which of two scores is better."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from types import MappingProxyType

from fedtune.rounds.record import COUNTS, Metrics

WEIGHTS: Mapping[str, str] = MappingProxyType({"loss": "tokens", "rouge_l": "generated", "exact_match": "generated"})
"""The count over which a metric is a mean; `examples` for all others, and where a client does not say that count."""
LOWER_IS_BETTER = frozenset({"loss", "perplexity", "bits_per_character"})
HIGHER_IS_BETTER = frozenset({"accuracy", "macro_f1", "rouge_l", "exact_match", "reward_accuracy", "preferred"})
"""Shares from 0 to 1."""
SIGNED = frozenset({"reward_margin"})
"""Higher is better, and 0 is where a model starts."""


def pooled_scores(scores: Mapping[str, Metrics]) -> Metrics:
    """Return the scores on all clients' data together: each client's weighted by how much it counted.

    That is exact for loss, accuracy and the scores of answers; perplexity and bits per character follow from the
    pooled loss. The F1 over classes does not follow from those of the clients: it is their mean, weighted by examples.
    A metric that a client does not state, or that is not finite there, is pooled over the others.
    """
    known = [scores[name] for name in sorted(scores)]
    counts = {key: sum(int(own.get(key) or 0) for own in known) for key in COUNTS if any(key in own for own in known)}
    names = [key for key in dict.fromkeys(key for own in known for key in own) if key not in COUNTS]
    pooled = {name: mean for name in names if (mean := weighted_mean(known, name)) is not None}
    if "perplexity" in pooled and "loss" in pooled:
        # e^710 is beyond a float.
        pooled["perplexity"] = math.exp(min(pooled["loss"], 700.0))
    if "bits_per_character" in pooled and (bits := pooled_bits(known)) is not None:
        pooled["bits_per_character"] = bits
    return {**pooled, **counts}


def median_score(scores: Mapping[str, Metrics], metric: str) -> float | None:
    """Return the median of a metric over clients, each counted once; None for fewer than three that state it.

    >>> median_score({"a": {"loss": 2.0}, "b": {"loss": 2.2}, "liar": {"loss": 0.0, "examples": 10**9}}, "loss")
    2.0
    """
    known = [value for own in scores.values() if (value := own.get(metric)) is not None and math.isfinite(value)]
    # Not weighted: how many rows it holds out is a claim of the client's, too.
    return float(median(known)) if len(known) >= 3 else None


def weighted_mean(scores: Sequence[Metrics], metric: str) -> float | None:
    """Return a metric's mean over clients, each weighted by what it is a mean over; None where no client states it."""
    total = weight = 0.0
    for own in scores:
        value = own.get(metric)
        count = own.get(WEIGHTS.get(metric, "examples")) or own.get("examples") or 0
        if value is not None and math.isfinite(value) and count > 0:
            total, weight = total + count * value, weight + count
    return total / weight if weight else None


def pooled_bits(scores: Sequence[Metrics]) -> float | None:
    """Return the bits per character over all clients' texts; None where it cannot be said how long they are."""
    nats = characters = 0.0
    for own in scores:
        loss, bits, tokens = own.get("loss"), own.get("bits_per_character"), own.get("tokens")
        if loss is None or not bits or not tokens or not (math.isfinite(loss) and math.isfinite(bits)):
            continue
        # A client states its bits per character and not its characters, which follow from them.
        nats, characters = nats + loss * tokens, characters + loss * tokens / math.log(2) / bits
    return nats / math.log(2) / characters if characters else None


def is_better(metric: str, score: float | None, best: float | None) -> bool:
    """Return whether a score is better than the best so far; one that is missing or not finite never is.

    >>> is_better("loss", 2.0, 2.5), is_better("accuracy", 0.5, 0.5), is_better("loss", 2.0, None)
    (True, False, True)
    """
    if score is None or not math.isfinite(score):
        return False
    if best is None:
        return True
    return score < best if metric in LOWER_IS_BETTER else score > best
