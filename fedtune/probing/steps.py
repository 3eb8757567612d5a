"""From the losses around a point to a step along each seed: where they are measured, the slope, and its bound."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np

from fedtune.messages import ProbeSeeds

CLIP_WINDOW, CLIP_MINIMUM, CLIP_QUANTILE, CLIP_FACTOR = 128, 16, 0.9, 2.0
"""The running clip: 2 times the 0.9-quantile of the last 128 sizes of g, from 16 sizes on."""
MIN_SIGMA = 1e-8
"""Standard deviation of a step's losses below which a normalised step is noise, and is skipped."""

Move: TypeAlias = tuple[int, int]
"""A seed, and by how much its accumulator is moved."""
OnStep: TypeAlias = Callable[[int, int], None]
"""(steps taken, all steps): hears how far a training is."""


def no_steps(done: int, total: int) -> None:
    """Hear of a step, and do nothing."""


def finite(numbers: Sequence[float]) -> bool:
    """Return whether all numbers are finite."""
    return all(map(math.isfinite, numbers))


def around(seeds: Sequence[int], probe: ProbeSeeds) -> Sequence[Move]:
    """Return the moves at which the losses of a step are measured; w + E u z is at the accumulators A - E e_k."""
    if probe.estimator == "one-sided":
        return [(seeds[0], 0), *((seed, -probe.perturbation) for seed in seeds)]
    return [(seed, amount) for seed in seeds for amount in (-probe.perturbation, probe.perturbation)]


def steps_of(losses: Sequence[float], probe: ProbeSeeds, learning_rate: float, sizes: deque[float]) -> list[float]:
    """Return the step along each seed, in the weights' own unit; appends |g| to `sizes` for the running clip.

    Two-sided (Spall 1992; MeZO, arXiv 2305.17333): lr (l+ - l-) / (2 eps). One-sided over N queries (FZOO, arXiv
    2506.09034): lr (l_i - l_0) / (N eps), or / (N sigma) with the standard deviation of the N losses.
    """
    distance = probe.perturbation * 2.0**-probe.exponent
    if probe.estimator == "two-sided":
        plus, minus = losses
        return [learning_rate * clip_scalar((plus - minus) / (2 * distance), probe.clip, sizes)]
    first, others = losses[0], losses[1:]
    if probe.normalise:
        sigma = float(np.std(others))
        return [0.0 if sigma < MIN_SIGMA else learning_rate * (loss - first) / (len(others) * sigma) for loss in others]
    return [learning_rate * clip_scalar((loss - first) / distance, probe.clip, sizes) / len(others) for loss in others]


def clip_scalar(g: float, clip: float, sizes: deque[float]) -> float:
    """Return g within [-bound, bound], appending |g| to `sizes` where the bound is the running one (`clip` of 0)."""
    bound = clip
    if clip == 0.0:
        bound = CLIP_FACTOR * float(np.quantile(sizes, CLIP_QUANTILE)) if len(sizes) >= CLIP_MINIMUM else math.inf
        sizes.append(abs(g))
    return max(-bound, min(bound, g))
