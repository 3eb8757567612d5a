"""Scores with their standard errors and 95 % intervals: shares, means, losses per token, and differences of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.seeds import derive, generator

Z = 1.959963984540054
"""Two-sided 95 % quantile of the normal distribution."""
DRAWS = 2000
"""Resamples of a bootstrap interval."""


@dataclass(frozen=True)
class Estimate:
    """A score over some items."""

    value: float
    stderr: float | None
    """Standard error; None for fewer than two items."""
    low: float | None
    """Lower end of the 95 % interval; None where there is no standard error."""
    high: float | None
    """Upper end of it."""
    items: int
    """Items that were scored."""


def share(hits: Sequence[float]) -> Estimate:
    """Return the share of ones among zeros and ones, with Wilson's score interval (1927).

    >>> share([1, 0, 0, 0]).value, round(share([0] * 10).high or 0, 4)
    (0.25, 0.2775)
    """
    n, p = len(hits), float(np.mean(hits))
    centre, width = p + Z**2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    low, high = ((centre + sign * width) / (1 + Z**2 / n) for sign in (-1, 1))
    # At no hits and at hits alone the ends are 0 and 1 exactly, but for rounding.
    return Estimate(p, deviation_of_mean(hits), max(0.0, min(low, p)), min(1.0, max(high, p)), n)


def mean(values: Sequence[float]) -> Estimate:
    """Return the mean of any numbers, with the interval of the normal distribution."""
    return normal(float(np.mean(values)), deviation_of_mean(values), len(values))


def mean_of_groups(groups: Sequence[Sequence[float]]) -> Estimate:
    """Return the mean over the groups' means, whatever their sizes; within each group items vary, groups are given."""
    sizes = [len(values) for values in groups]
    value = float(np.mean([float(np.mean(values)) for values in groups]))
    if min(sizes) < 2:
        return normal(value, None, sum(sizes))
    errors = [float(np.var(values, ddof=1)) / len(values) for values in groups]
    return normal(value, math.sqrt(sum(errors)) / len(groups), sum(sizes))


def ratio(sums: Sequence[float], counts: Sequence[float]) -> Estimate:
    """Return a loss per token, sum over sum, with the error of a ratio estimator (Cochran 1977, eq. 2.46).

    Args:
        sums: each item's summed loss.
        counts: each item's tokens.
    """
    value = float(np.sum(sums) / np.sum(counts))
    return normal(
        value, deviation_of_ratio((np.asarray(sums) - value * np.asarray(counts)).tolist(), counts), len(sums)
    )


def difference(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Return the mean change of items that were scored twice: what both have in common does not widen the interval."""
    if not all(value in (0, 1) for value in (*before, *after)):
        return mean(np.subtract(after, before).tolist())
    return difference_of_shares(before, after)


def difference_of_shares(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Return the change of a share of the same items, with the adjusted Wald interval of Agresti and Min (2005).

    Half an item more in every cell of the two by two table: without it, two models that answer all of a few items
    alike would have an interval of width 0.
    """
    changes = np.subtract(after, before)
    gained, lost, n = float(np.sum(changes > 0)), float(np.sum(changes < 0)), len(changes)
    value, total = (gained - lost) / n, n + 2
    up, down = gained + 0.5, lost + 0.5
    centre = (up - down) / total
    width = Z * math.sqrt((up + down) - (up - down) ** 2 / total) / total
    low, high = max(-1.0, centre - width), min(1.0, centre + width)
    return Estimate(value, deviation_of_mean(changes.tolist()), low, high, n)


def difference_of_ratios(before: Sequence[float], after: Sequence[float], counts: Sequence[float]) -> Estimate:
    """Return the change of a loss per token over the same items and tokens."""
    return ratio(np.subtract(after, before).tolist(), counts)


def bootstrap(values: Sequence[float], *, seed: int, purpose: str) -> Estimate:
    """Return the mean with a percentile bootstrap interval, for few values of any distribution, such as clients'."""
    estimate = mean(values)
    if len(values) < 2:
        return estimate
    draws = generator(derive(seed, purpose)).integers(len(values), size=(DRAWS, len(values)))
    low, high = np.quantile(np.asarray(values)[draws].mean(axis=1), [0.025, 0.975])
    return Estimate(estimate.value, estimate.stderr, float(low), float(high), len(values))


def normal(value: float, stderr: float | None, items: int) -> Estimate:
    if stderr is None:
        return Estimate(value, None, None, None, items)
    return Estimate(value, stderr, value - Z * stderr, value + Z * stderr, items)


def deviation_of_mean(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean, the sample deviation over the root of n; None for fewer than two values."""
    return float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else None


def deviation_of_ratio(residuals: Sequence[float], counts: Sequence[float]) -> float | None:
    n = len(counts)
    return math.sqrt(n / (n - 1) * float(np.sum(np.square(residuals)))) / float(np.sum(counts)) if n > 1 else None
