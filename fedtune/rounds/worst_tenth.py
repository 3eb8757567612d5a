"""The tenth of clients that a model serves worst: their mean score, and of how many clients and rows it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from fedtune.rounds.record import COUNTS, Metrics
from fedtune.rounds.scores import LOWER_IS_BETTER


@dataclass(frozen=True)
class WorstTenth:
    """A metric of the tenth of clients, at least one, for which a model scores worst."""

    mean: float
    """Plain mean over these clients."""
    clients: int
    """How many they are."""
    of: int
    """Clients that state the metric."""
    rows: int
    """Rows that the score of these clients is of."""


def worst_tenth(scores: Mapping[str, Metrics], metric: str = "loss") -> WorstTenth | None:
    """Return a metric's mean over the tenth of clients with its worst values; None for fewer than two that state it.

    >>> losses = {f"client-{number}": {"loss": float(number), "examples": 5} for number in range(20)}
    >>> worst_tenth(losses)
    WorstTenth(mean=18.5, clients=2, of=20, rows=10)

    Args:
        scores: of one model on each client's rows, by client.
        metric: a lower loss is better, a higher accuracy; values that are not finite are left out.
    """
    known = {name: value for name, own in scores.items() if (value := own.get(metric)) is not None}
    known = {name: value for name, value in known.items() if math.isfinite(value)}
    if len(known) < 2:
        return None  # of one client it is the mean
    # By value and then by name, so that the rows of equal values are those of the same clients in every report.
    from_worst = sorted(known, key=lambda name: (-known[name] if metric in LOWER_IS_BETTER else known[name], name))
    worst = from_worst[: -(-len(known) // 10)]
    rows = sum(int(scores[name].get("examples") or 0) for name in worst)
    return WorstTenth(math.fsum(known[name] for name in worst) / len(worst), len(worst), len(known), rows)


def worst_tenths(scores: Mapping[str, Metrics]) -> Mapping[str, float | int]:
    """Return the worst tenth of every metric that all clients state, with its `clients` and, of the loss, `examples`.

    Empty for fewer than two clients.
    """
    names = [key for key in next(iter(scores.values()), {}) if key not in COUNTS]
    tenths = {key: tenth for key in names if (tenth := worst_tenth(scores, key)) and tenth.of == len(scores)}
    if not tenths:
        return {}
    of_loss = tenths.get("loss") or next(iter(tenths.values()))
    return {**{key: tenth.mean for key, tenth in tenths.items()}, "clients": of_loss.clients, "examples": of_loss.rows}
