"""Time to target: how long each recipe takes, on the devices' clock, to the loss at which the weakest recipe ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.report.curves import Floats, LossCurve, last, loss_curve
from fedtune.report.reader import Run

T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t at 0.975 for 1 to 15 degrees of freedom; beyond that the last value makes intervals slightly too wide."""


@dataclass(frozen=True)
class Ratio:
    """Geometric mean over seeds of one recipe's time over another's, with its 95 % interval (paired, of logarithms)."""

    mean: float
    low: float
    """NaN for fewer than two seeds, as is `high`."""
    high: float


@dataclass(frozen=True)
class TimeToTarget:
    """One recipe's seconds until the common target of each seed that all recipes share."""

    seconds: tuple[float, ...]
    ratio: Ratio
    """Of these seconds to the first recipe's."""


def times_to_target(
    groups: Sequence[Sequence[Run]], read: Callable[[LossCurve], Floats]
) -> tuple[Mapping[int, float], tuple[TimeToTarget, ...]]:
    """Return the common target by seed, and each recipe's time to it; nothing where no seed has one.

    The target of a seed is the loss at which the weakest recipe ends there, so that no recipe is left out. The end and
    not the lowest loss: where a recipe is best in its first round, that would compare first rounds. Between two
    measurements the later one counts. A seed in which a recipe ends above its start has no target: it is there
    before it begins.

    Args:
        groups: the runs of each recipe.
        read: selects one of a run's losses.
    """
    curves = [{run.seed: loss_curve(run) for run in members} for members in groups]
    shared = sorted(set.intersection(*(set(by_seed) for by_seed in curves)))
    ends = {
        seed: [last(read(by_seed[seed])) for by_seed in curves]
        for seed in shared
        if all(by_seed[seed].clock.any() for by_seed in curves)
    }
    targets = {
        seed: max(losses)
        for seed, losses in ends.items()
        if not any(map(math.isnan, losses))
        and all(time_to(by_seed[seed].clock, read(by_seed[seed]), max(losses)) > 0 for by_seed in curves)
    }
    if not targets:
        return {}, ()
    times = [
        tuple(time_to(by_seed[seed].clock, read(by_seed[seed]), target) for seed, target in targets.items())
        for by_seed in curves
    ]
    return targets, tuple(TimeToTarget(seconds, paired_ratio(seconds, times[0])) for seconds in times)


def time_to(clock: Floats, losses: Floats, target: float) -> float:
    """Return the seconds after which a loss is first at or below the target; infinite where it never is.

    >>> time_to(np.array([0.0, 5.0, 9.0]), np.array([3.0, math.nan, 1.0]), 2.0)
    9.0
    """
    reached = np.flatnonzero(losses <= target)  # a comparison with NaN is false
    return float(clock[reached[0]]) if reached.size else math.inf


def paired_ratio(seconds: Sequence[float], others: Sequence[float]) -> Ratio:
    """Return the ratio of one recipe's times to another's, paired by seed.

    >>> paired_ratio([2.0, 8.0], [1.0, 4.0])
    Ratio(mean=2.0, low=2.0, high=2.0)
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(np.array(seconds) / np.array(others))
    if not np.isfinite(logs).all():
        return Ratio(math.nan, math.nan, math.nan)
    mean = float(logs.mean())
    if logs.size < 2:
        return Ratio(math.exp(mean), math.nan, math.nan)
    half = T_975[min(logs.size - 1, len(T_975)) - 1] * float(logs.std(ddof=1)) / math.sqrt(logs.size)
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half))
