"""What bandits are paid for: a lower loss for the time it took, beside the others of the same round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from fedtune.planning.policy import Observed

RewardName: TypeAlias = Literal["time", "fedmp"]

LARGEST_GAIN = 3.0
"""Medians of a round's gains beyond which a gain counts no more."""
LARGEST_DELAY = 10.0
"""Medians of a round's times beyond which a delay counts no more: one client's claim must not drown all others."""


@dataclass(frozen=True)
class Relative:
    """One client's round beside those of its cohort."""

    gain: float
    """Loss gained over the median of the cohort's sizes of it, clipped to [0, 3] and divided by 3."""
    delay: float
    """How much longer than the cohort's median it took, in medians; 0 for whoever was quicker."""
    importance: float
    """As the gain is, of |parameter * gradient|; 0 where it was not measured."""


def relative(observed: Sequence[Observed]) -> Mapping[str, Relative]:
    """Return what each client that can be judged came to; a median takes the round's own level out.

    Gains fall over a run, so that raw ones would prefer whatever was tried early. The loss before is that before
    surgery, so that nobody is paid for repairing what pruning broke. Whoever is quicker than the median is not
    punished, or fast devices would be told to do idle work.
    """
    known = [each for each in sorted(observed, key=lambda one: one.client) if is_rewardable(each)]
    gains = {each.client: (each.loss_before or 0.0) - (each.loss_after or 0.0) for each in known}
    middle = float(np.median([abs(gain) for gain in gains.values()])) if gains else 0.0
    times = [each.seconds for each in known if each.seconds is not None]
    typical = float(np.median(times)) if times else 0.0
    weights = [each.importance for each in known if each.importance is not None and np.isfinite(each.importance)]
    weight = float(np.median(weights)) if weights else 0.0
    return {
        each.client: Relative(
            gain=share(gains[each.client], middle),
            delay=min(LARGEST_DELAY, max(0.0, (each.seconds or 0.0) / typical - 1)) if typical > 0 else 0.0,
            importance=share(each.importance or 0.0, weight),
        )
        for each in known
    }


def is_rewardable(each: Observed) -> bool:
    """Return whether a client's losses are known, and its time is possible; where no clock runs, nobody's is known."""
    losses = (each.loss_before, each.loss_after)
    there = all(loss is not None and np.isfinite(loss) for loss in losses)
    return there and (each.seconds is None or (np.isfinite(each.seconds) and each.seconds >= 0))


def share(value: float, middle: float) -> float:
    if middle <= 0 or not np.isfinite(value):
        return 0.0
    return float(np.clip(value / middle, 0.0, LARGEST_GAIN)) / LARGEST_GAIN


def with_worst(paid: Mapping[str, float], observed: Sequence[Observed]) -> Mapping[str, float]:
    """Return what was paid, and to every client whose work was not used the least of it, at most 0.

    Else an arm that never comes home would stay untried, and be asked for again and again.
    """
    worst = min([0.0, *paid.values()])
    return {**dict.fromkeys(sorted(each.client for each in observed if not each.used), worst), **paid}


def rewards(observed: Sequence[Observed], name: RewardName) -> Mapping[str, float]:
    """Return what each client's arm is paid: gain - delay / 2; `fedmp`: gain over |T - mean| / mean + .05 (FedMP)."""
    if name == "time":
        return {client: each.gain - 0.5 * each.delay for client, each in relative(observed).items()}
    known = [each for each in sorted(observed, key=lambda one: one.client) if is_rewardable(each)]
    mean = float(np.mean([each.seconds or 0.0 for each in known])) if known else 0.0
    found = {}
    for each in known:
        off = abs((each.seconds or 0.0) - mean) / mean if mean > 0 else 0.0
        found[each.client] = ((each.loss_before or 0.0) - (each.loss_after or 0.0)) / (off + 0.05)
    return found
