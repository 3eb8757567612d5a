"""What clients say of the importance of their modules, pooled on the server: shares, each within a bound."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from fedtune.seeds import derive, generator

MEMORY = 0.5
"""Weight of what is known already against a round's reports."""
LARGEST_CLAIM = 4.0
"""Medians of a module's reports beyond which one counts no more."""
LARGEST_WEIGHT = 10.0
"""Medians of the reports' weights beyond which one counts no more, as updates do by `rounds.weight_cap`."""
ENOUGH = 3
"""Reports of a module from which a median says more than each of them."""

Importance = Mapping[str, float]
"""By module; sums to 1."""


@dataclass(frozen=True)
class Report:
    """What one client has measured in one round."""

    weight: float
    """Its training examples."""
    shares: Mapping[str, float]
    """By module that it trained, at least 0; sums to about 1, as admission has checked."""


def uniform(modules: Sequence[str]) -> Importance:
    return dict.fromkeys(modules, 1 / len(modules))


def random_shares(modules: Sequence[str], seed: int) -> Importance:
    """Return random importance, for comparisons: exponential, so that some modules stand out as measured ones do."""
    rng = generator(derive(seed, "fedpipe.importance"))
    values = rng.standard_exponential(len(modules))
    return dict(zip(sorted(modules), (values / values.sum()).tolist(), strict=True))


def pool(known: Importance | None, reports: Sequence[Report], modules: Sequence[str]) -> Importance | None:
    """Return the importance after a round's reports; None where nothing was ever reported.

    A client that holds few modules gives each a large share of its own sum: its shares count as parts of what these
    modules have together. A module that no client held keeps its value.
    """
    if not reports:
        return known
    before = known or uniform(modules)
    # Clients state their examples: one that claims a thousand times as many would decide alone.
    most = LARGEST_WEIGHT * median(report.weight for report in reports) if len(reports) >= ENOUGH else float("inf")
    scaled = [(min(report.weight, most), scale_to(report.shares, before)) for report in reports]
    pooled = {}
    for name in modules:
        own = [(weight, shares[name]) for weight, shares in scaled if name in shares]
        if not own:
            pooled[name] = before[name]
            continue
        mean = weighted_mean(own)
        pooled[name] = mean if known is None else MEMORY * before[name] + (1 - MEMORY) * mean
    total = sum(pooled.values())
    return {name: value / total for name, value in pooled.items()} if total > 0 else before


def scale_to(shares: Mapping[str, float], known: Importance) -> Mapping[str, float]:
    """Return shares scaled to what is known of their modules together."""
    total, mass = sum(shares.values()), sum(known[name] for name in shares)
    return {name: share * mass / total for name, share in shares.items()}


def weighted_mean(values: Sequence[tuple[float, float]]) -> float:
    """Return the mean of (weight, value), no value beyond `LARGEST_CLAIM` medians.

    >>> weighted_mean([(1, 0.1), (1, 0.1), (2, 1.0)])
    0.25
    """
    # Clients state it: one that claims all for a module would decide alone where the others train.
    most = LARGEST_CLAIM * median(value for _, value in values) if len(values) >= ENOUGH else float("inf")
    total = sum(weight for weight, _ in values)
    return sum(weight * min(value, most) for weight, value in values) / total
