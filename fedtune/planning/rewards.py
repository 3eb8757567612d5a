"""The rewards of bandits: the loss gained for the time it took, compared with the other clients of the same round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Literal, TypeAlias

import numpy as np

from fedtune.planning.policy import Observed

RewardName: TypeAlias = Literal["time", "fedmp"]

LARGEST_GAIN = 3.0
"""Medians of a round's gains beyond which a gain counts no more."""
LARGEST_DELAY = 10.0
"""Medians of a round's times beyond which a delay counts no more: one client's claim must not drown all others."""
LARGEST_CLAIM = 10.0
"""FedMP, where gains count in full: medians of a round's gains, or times, beyond which one counts no more."""
PRICE_OF_DELAY = 0.5
"""Reward lost for every median of the round's times that a client is late."""
SMALLEST_GAP = 0.05
"""FedMP: least distance to the mean time that is divided by."""


@dataclass(frozen=True)
class Relative:
    """One client's round, compared with those of its cohort."""

    gain: float
    """Loss gained over the median of the cohort's absolute gains, clipped to [0, 3] and divided by 3."""
    delay: float
    """How much longer than the cohort's median it took, in medians; 0 for quicker clients."""
    importance: float
    """|parameter * gradient|, scaled like the gain; 0 where it was not measured."""


def relative(observed: Sequence[Observed]) -> Mapping[str, Relative]:
    """Return how each client that can be rewarded compares with its cohort, by name.

    Gains fall over a run: uncompared, they would favour the arms that were tried early. A client that is quicker than
    the median is not punished, or fast devices would be given work that only passes the time.
    """
    known = [seen for seen in sorted(observed, key=lambda client: client.client) if is_rewardable(seen)]
    gains = {seen.client: loss_gained(seen) for seen in known}
    times = [seen.seconds for seen in known if seen.seconds is not None]
    importances = [seen.importance for seen in known if seen.importance is not None and np.isfinite(seen.importance)]
    # Of absolute gains: where most clients lost, the median itself would turn every sign around.
    gain, time, importance = median([abs(gain) for gain in gains.values()]), median(times), median(importances)
    return {
        seen.client: Relative(
            gain=clipped_share(gains[seen.client], gain),
            delay=min(LARGEST_DELAY, max(0.0, (seen.seconds or 0.0) / time - 1)) if time > 0 else 0.0,
            importance=clipped_share(seen.importance or 0.0, importance),
        )
        for seen in known
    }


def is_rewardable(seen: Observed) -> bool:
    """Return whether a client's losses are known and its time is possible; without a clock no time is known."""
    losses = (seen.loss_before, seen.loss_after)
    # Clients report these numbers: one that is not finite would spoil the medians of all.
    known = all(loss is not None and np.isfinite(loss) for loss in losses)
    return known and (seen.seconds is None or (np.isfinite(seen.seconds) and seen.seconds >= 0))


def loss_gained(seen: Observed) -> float:
    # The loss before is that of the last participation's structure: repairing what pruning broke earns nothing.
    return (seen.loss_before or 0.0) - (seen.loss_after or 0.0)


def median(values: Sequence[float]) -> float:
    return float(np.median(values)) if values else 0.0


def clipped_share(value: float, middle: float) -> float:
    """Return a value in medians, clipped to [0, 3] and divided by 3."""
    if middle <= 0 or not np.isfinite(value):
        return 0.0
    return float(np.clip(value / middle, 0.0, LARGEST_GAIN)) / LARGEST_GAIN


def with_worst(paid: Mapping[str, float], observed: Sequence[Observed]) -> Mapping[str, float]:
    """Return the rewards, with the lowest of them (at most 0) for every client whose work was not used.

    Otherwise an arm with which a client never finishes would count as untried, and be chosen again and again.
    """
    worst = min([0.0, *paid.values()])
    return {**dict.fromkeys(sorted(seen.client for seen in observed if not seen.used), worst), **paid}


def rewards(observed: Sequence[Observed], name: RewardName) -> Mapping[str, float]:
    """Return each client's reward by name.

    `time`: gain - delay / 2. `fedmp`: gain / (|T - mean T| / mean T + 0.05), as FedMP has it, of gains and times
    within `bounded_claims`.
    """
    if name == "time":
        return {client: own.gain - PRICE_OF_DELAY * own.delay for client, own in relative(observed).items()}
    known = [seen for seen in sorted(observed, key=lambda client: client.client) if is_rewardable(seen)]
    # Clients state both: rewards of all of them share one mean and one deviation, which a single claim would set.
    gains = bounded_claims([loss_gained(seen) for seen in known])
    times = bounded_claims([seen.seconds or 0.0 for seen in known])
    mean = float(np.mean(times)) if known else 0.0
    # As published: a client quicker than the mean loses as well, which `time` avoids.
    gaps = [abs(time - mean) / mean if mean > 0 else 0.0 for time in times]
    return {seen.client: gain / (gap + SMALLEST_GAP) for seen, gain, gap in zip(known, gains, gaps, strict=True)}


def bounded_claims(values: Sequence[float]) -> Sequence[float]:
    """Return what clients state, none further from 0 than `LARGEST_CLAIM` medians of all.

    >>> bounded_claims([0.2, 0.1, -0.1, 1e12]), bounded_claims([0.5, 1e12])
    ([0.2, 0.1, -0.1, 1.0], [0.5, 5.0])
    """
    # Of two the smaller one: half of what a single liar states would be no bound for it.
    most = LARGEST_CLAIM * median_low([abs(value) for value in values]) if values else 0.0
    return [min(most, max(-most, value)) for value in values]
