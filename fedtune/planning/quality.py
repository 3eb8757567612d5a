"""What an arm is worth: hypotheses on how much a client learns with it, and how likely the rounds so far make each.

Time is known in closed form from operations and bytes; what a client learns is not, and this is all that is learned of
it. The clients of all rounds teach the same few numbers: one client alone takes part some tens of times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Literal, TypeAlias

import numpy as np

from fedtune.planning.policy import Arm, Observed
from fedtune.tensors import Array

Taught: TypeAlias = Literal["own", "whole"]
"""Which model a gain is of: the one that the client trained, or the whole one."""
TAUGHT: Sequence[Taught] = ("own", "whole")
LogLikelihood: TypeAlias = tuple[float, ...]
"""By hypothesis; () before anything is known, when all are as likely."""

FORGETTING = 0.99
"""Weight of older rounds in the likelihood of a hypothesis."""
LARGEST_CLAIM = 10.0
"""Medians of a round's gains beyond which a gain counts no more."""
FEWEST = 3
"""Clients of a round whose gains teach anything: two points always fit a scaled curve too well."""

PRUNED = tuple(product((0.4, 0.55, 0.7, 0.85, 0.95), (1.0, 2.0, 3.0)))
"""(pn, w): nothing is learned from the pruning ratio pn on, and w bends the way there."""
RANKS = (0.7, 1.5, 3.0, 6.0)
"""rn: ranks far above it add little."""
TOPS, BACKS, SHARES, DOWNS = (0.1, 0.4, 0.8), (0.1, 0.4, 0.8), (0.05, 0.15, 0.3), (0.02, 0.1, 0.3)
"""Exponents: of the share of trained blocks, of what the backward pass does, of the steps, of the rank that is sent."""


@lru_cache(maxsize=64)
def hypotheses(arms: tuple[Arm, ...]) -> Array:
    """Return the hypotheses that tell these arms apart, (hypotheses, 7): pn, w, rn, and the four exponents.

    What does not differ between the arms has one value: it would only repeat the others.
    """
    columns = zip(*((arm.ratio, arm.rank, arm.top, arm.back, arm.share, arm.down_rank) for arm in arms), strict=True)
    varied = [len(set(column)) > 1 for column in columns]
    pruned = PRUNED if varied[0] else PRUNED[:1]
    others = [
        values if differs else values[:1]
        for values, differs in zip((RANKS, TOPS, BACKS, SHARES, DOWNS), varied[1:], strict=True)
    ]
    return np.array([(*pair, *rest) for pair, rest in product(pruned, product(*others))])


def quality(arms: Sequence[Arm], of: Array) -> Array:
    """Return how much each hypothesis says that an arm learns, (hypotheses, arms), each in [0, 1].

    clip(1 - (p / pn)^w, 0, 1) (1 - e^(-r / rn)) top^t (1 - back)^b share^s (d / d_max)^d for the ratio p, the rank r,
    and the rank d that is sent, of at most d_max.
    """
    ratio = np.array([arm.ratio for arm in arms])
    rank = np.array([arm.rank for arm in arms], np.float64)
    part = np.array([(arm.top, 1 - arm.back, arm.share) for arm in arms])  # (arms, 3)
    sent = [arm.down_rank for arm in arms if arm.down_rank is not None]
    # Without a bound of its own, an arm is sent as much as the one with the largest.
    down = np.array([1.0 if arm.down_rank is None else arm.down_rank / max(sent) for arm in arms])
    pn, w, rn, top, back, share, low = (of[:, i : i + 1] for i in range(7))
    effort = part[:, 0] ** top * part[:, 1] ** back * part[:, 2] ** share * down**low
    return np.asarray(np.clip(1 - (ratio / pn) ** w, 0, 1) * (1 - np.exp(-rank / rn)) * effort)


def shares(log_likelihood: LogLikelihood, of: Array) -> Array:
    """Return the probability of each hypothesis."""
    if not log_likelihood:
        return np.full(len(of), 1 / len(of))
    likely = np.array(log_likelihood)
    # Less the largest: e to the others underflows to 0, and none overflows.
    share = np.exp(likely - likely.max())
    return np.asarray(share / share.sum())


def gains(observed: Sequence[Observed], taught: Taught) -> Sequence[tuple[Arm, float]]:
    """Return by how much the loss fell with each client's arm, by name, where it is known and finite."""
    pairs = []
    for seen in sorted(observed, key=lambda client: client.client):
        before, after = seen.loss_before, seen.loss_after
        if taught == "whole" and (seen.arm.ratio > 0 or seen.whole_loss_before is not None):
            # A client that trained the whole model has measured it anyway, unless it came from a smaller one.
            before, after = seen.whole_loss_before, seen.whole_loss_after
        if before is not None and after is not None and np.isfinite(before - after):
            pairs.append((seen.arm, before - after))
    return pairs


def updated_likelihood(
    log_likelihood: LogLikelihood, seen: Sequence[tuple[Arm, float]], arms: tuple[Arm, ...], of: Array
) -> LogLikelihood:
    """Return the log-likelihoods of the hypotheses after a round.

    Each hypothesis is scaled to the round's gains before the two are compared. Gains fall over a run, so only the
    contrast between clients of the same round teaches anything.

    Args:
        log_likelihood: before the round.
        seen: arms and gains, as `gains` returns them.
        arms: all arms of the policy.
        of: its hypotheses.
    """
    # A run may be resumed with arms that other releases had: what they taught is of no arm here.
    index: Mapping[Arm, int] = {arm: place for place, arm in enumerate(arms)}
    played = np.array([index[arm] for arm, _ in seen if arm in index], np.int64)
    gained = np.array([gain for arm, gain in seen if arm in index])
    scale = float(np.median(np.abs(gained))) if len(gained) else 0.0
    if len(gained) < FEWEST or scale == 0:
        return log_likelihood
    # Clients state their losses: one that claims a wonder must not drown what all others teach.
    gained = np.clip(gained / scale, -LARGEST_CLAIM, LARGEST_CLAIM)
    # Sums by arm: ten thousand clients play a few dozen.
    number = np.bincount(played, minlength=len(arms))
    total = np.bincount(played, weights=gained, minlength=len(arms))
    squares = float(gained @ gained)
    predicted = quality(arms, of)  # (hypotheses, arms)
    size, along = (predicted * predicted) @ number, predicted @ total
    # Least squares, never negative: no hypothesis says that a larger loss is better.
    factor = np.maximum(0.0, along / np.where(size > 0, size, 1.0))
    residual = np.maximum(0.0, squares - 2 * factor * along + factor * factor * size)
    # The best hypothesis sets the noise; the floor keeps one exact fit from ruling out all others at once.
    noise = 2 * max(float(residual.min()) / len(gained), 1e-4)
    before = np.array(log_likelihood) if log_likelihood else np.zeros(len(of))
    return tuple((FORGETTING * before - residual / noise).tolist())
