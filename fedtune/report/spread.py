"""A number over the seeds of a recipe: its mean and sample standard deviation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Spread:
    """One number over the seeds of a recipe."""

    mean: float
    """NaN if no seed measured it."""
    deviation: float | None
    """Sample standard deviation (divided by n - 1); None for fewer than two seeds."""


def mean_and_spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation of the values that are known.

    >>> mean_and_spread([1.0, 3.0])
    Spread(mean=2.0, deviation=1.4142135623730951)
    """
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return Spread(math.nan, None)
    if len(set(known)) == 1:  # the mean of equal numbers is rounded, and would not be one of them
        return Spread(known[0], 0.0 if len(known) > 1 else None)
    return Spread(float(np.mean(known)), float(np.std(known, ddof=1)))
