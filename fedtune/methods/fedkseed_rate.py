"""The learning rate of FedKSeed from one round of measurements: slopes and curvatures along shared directions.

A step of rate r along a direction z lowers the loss by r g G - r^2 g^2 c / 2, where g is the slope that one client
has measured on a batch, G that of the whole, and c = z'Hz the curvature. In the mean over directions that is largest at
r = rho / c, with rho = E[gG] / E[g^2], the share of a slope that clients agree on. A mean over n clients, each along
directions of its own, takes the noise out n-fold, and so allows n rho / c; but each client walks its steps alone, and
overshoots from 2 / c on. Hence r = min(1, n rho) / (2 c): half of either, which costs a quarter of the gain where the
curvature is right, and still gains where it is twice as large.

No client alone can move it far: c is a median over clients, no client's slopes count more than those of the median
client, and of the agreements with each client left out in turn the largest counts, so that one who contradicts all
others lowers nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedtune.errors import RoundError
from fedtune.messages import AdmittedUpdate, Estimator, ProbeResult, Training
from fedtune.methods.fedkseed_state import FedKSeedState
from fedtune.tensors import Array

UNMEASURED = 2e-4
"""Learning rate that an order states whose measurements decide it: it is used for nothing."""
SHARE = 0.5
"""Of the rate at which the loss falls most, which is taken."""
LEAST_AGREEMENT = 1 / 64
"""What clients agree on, at least: over 16 directions a weak agreement looks like none."""
ONE_ALONE = 0.25
"""Taken for the agreement where a single client has measured: on the sets of the documents it is 0.1 to 0.8."""
EVIDENCE = 1.0
"""Standard deviations by which an agreement must lie above that of unrelated slopes."""
PLAIN = 3.0
"""Of the same: from here on one client who contradicts all others is taken for the one that is wrong."""


@dataclass(frozen=True)
class Measurement:
    """What one client has measured."""

    slopes: Sequence[float]
    """Along each shared direction."""
    curvatures: Sequence[float]
    """The same."""
    weight: int
    """What the client counts in a mean."""


@dataclass(frozen=True)
class RateChoice:
    """A learning rate, and what it follows from."""

    rate: float
    """Of a two-sided step: a weight moves by this times the slope."""
    curvature: float
    """c."""
    agreement: float
    """rho."""
    slope: float
    """Root mean square of the median client's slopes."""
    measurements: int
    """How many slopes were measured."""

    @property
    def figures(self) -> Mapping[str, float]:
        """The numbers for the records, by name."""
        return {
            "learning_rate": self.rate,
            "curvature": self.curvature,
            "agreement": self.agreement,
            "slope": self.slope,
            "measurements": self.measurements,
        }


def choose_rate(cohort: Sequence[Measurement], *, round: int) -> RateChoice:
    """Return the learning rate for clients of whom each has measured along the same directions.

    Args:
        cohort: at least one; the order changes nothing.
        round: for error messages.

    Raises:
        RoundError: if the loss does not change along the directions, or the clients' slopes have nothing in common.
    """
    sizes = [root_mean_square(one.slopes) for one in cohort]
    slope, curvature = middle(sizes), -middle([-root_mean_square(one.curvatures) for one in cohort])
    if not (slope > 0 and curvature > 0 and math.isfinite(slope) and math.isfinite(curvature)):
        raise no_signal(round, f"slopes of {slope:.3g} and curvatures of {curvature:.3g} in the median client")
    agreement, evidence = agreement_of(shorten(cohort, sizes, slope))
    if len(cohort) > 1 and evidence < EVIDENCE:
        raise no_signal(round, f"slopes of {len(cohort)} clients that agree by {agreement:.2f}, as unrelated ones may")
    weights = np.array([one.weight for one in cohort], np.float64)
    effective = float(weights.sum() ** 2 / np.square(weights).sum())
    rate = SHARE * min(1.0, effective * max(agreement, LEAST_AGREEMENT)) / curvature
    count = sum(len(one.slopes) for one in cohort)
    return RateChoice(round_digits(rate), round_digits(curvature), round_digits(agreement), round_digits(slope), count)


def round_digits(number: float) -> float:
    """Return a number to three digits: its noise is larger, and the last bit of a sum must not differ in a state."""
    return float(f"{number:.2e}")


def root_mean_square(numbers: Sequence[float]) -> float:
    return math.sqrt(math.fsum(number**2 for number in numbers) / len(numbers))


def middle(numbers: Sequence[float]) -> float:
    """Return the median; of an even number the smaller one in the middle, since a mean could be one client's word."""
    return sorted(numbers)[(len(numbers) - 1) // 2]


def shorten(cohort: Sequence[Measurement], sizes: Sequence[float], bound: float) -> Array:
    """Return the slopes, (clients, directions) in float64, each client's shortened to a root mean square."""
    shares = [1.0 if size <= bound else bound / size for size in sizes]
    return np.array([share * np.array(one.slopes) for share, one in zip(shares, cohort, strict=True)])


def agreement_of(slopes: Array) -> tuple[float, float]:
    """Return the share of a slope that clients agree on, and by how many standard deviations that is more than none.

    Each with the client left out without whom it is largest, where there are three or more.
    """
    count = len(slopes)
    if count == 1:
        return ONE_ALONE, 0.0
    if count == 2:
        return pairs_of(slopes)
    parts = [pairs_of(np.delete(slopes, place, axis=0)) for place in range(count)]
    second, largest = sorted(evidence for _, evidence in parts)[-2:]
    # Where only one choice of a client to leave out gives an agreement at all, that is chance, unless it is plain.
    evidence = largest if second >= 0 or largest >= PLAIN else second
    return max(agreement for agreement, _ in parts), evidence


def pairs_of(slopes: Array) -> tuple[float, float]:
    """Return the mean over pairs of clients of g_i g_j, over that of g_i^2; and in standard deviations of its noise."""
    squares = np.square(slopes)
    total = float(squares.sum())
    if total == 0:
        return 0.0, 0.0
    crossed = float((np.square(slopes.sum(axis=0)) - squares.sum(axis=0)).sum())
    # Under unrelated slopes every product g_i g_j has the mean 0, and counts twice.
    products = squares @ squares.T
    noise = float(np.sqrt(2 * max(0.0, products.sum() - np.trace(products))))
    return crossed / (total * (len(slopes) - 1)), crossed / noise if noise > 0 else 0.0


def rate_for(choice: Mapping[str, float], estimator: Estimator, *, queries: int, normalise: bool) -> float:
    """Return the rate by which an estimator takes steps as long as a two-sided step at the rate that was chosen.

    A one-sided step divides by its number of queries, and a normalised one by the slopes' own size as well.
    """
    rate = choice["learning_rate"]
    if estimator == "two-sided":
        return rate
    return rate * queries * (choice["slope"] if normalise else 1.0)


def no_signal(round: int, got: str) -> RoundError:
    return RoundError(
        f"round {round}: expected slopes of the loss that clients agree on, for client.learning_rate to follow from; "
        f"got {got}; give more examples, a larger client.batch, or a number as client.learning_rate; or, of a "
        "classifier, whose drawn head gives no signal along random directions, set adapter.head = 'lda'",
        final=True,
    )


def with_rate(state: FedKSeedState, training: Training) -> Training:
    """Return a client's training at the rate that was measured, where the recipe leaves it to that."""
    if training.learning_rate != "auto":
        return training
    settings = state.settings
    if not state.chosen:
        return replace(training, learning_rate=min(UNMEASURED, settings.largest_rate))
    rate = rate_for(state.chosen, settings.estimator, queries=settings.queries, normalise=settings.normalise)
    return replace(training, learning_rate=min(rate, settings.largest_rate))


def measurements(state: FedKSeedState, cohort: Sequence[AdmittedUpdate]) -> Mapping[str, Measurement]:
    """Return what clients have measured for the rate, by name; nothing of those that were not asked."""
    weights = state.settings.weights
    results = {update.client: (update.seeds, update.counts(weights)) for update in cohort}
    return {
        name: Measurement(result.slopes, result.curvatures, weight)
        for name, (result, weight) in results.items()
        if isinstance(result, ProbeResult) and result.slopes
    }


def chosen_rate(state: FedKSeedState, measured: Mapping[str, Measurement]) -> Mapping[str, float]:
    """Return what `FedKSeedState.chosen` stores of a round's measurements.

    Raises:
        RoundError: if no rate follows from them.
    """
    choice = choose_rate([measured[name] for name in sorted(measured)], round=state.round + 1)
    return {**choice.figures, "clients": len(measured), "round": state.round + 1}


def step_size(state: FedKSeedState, result: ProbeResult) -> float | None:
    """Return the root mean square of the steps that a client would take: as it says, or by its slopes."""
    return state.chosen["learning_rate"] * root_mean_square(result.slopes) if result.slopes else result.rms


def rate_figures(state: FedKSeedState) -> Mapping[str, float]:
    """Return what a round's line notes of a rate that was measured, as it is now."""
    if not state.chosen:
        return {}
    rate = state.chosen["learning_rate"] * 0.5**state.halvings
    return {"learning_rate": rate, **{name: state.chosen[name] for name in ("curvature", "agreement")}}


def rate_remarks(state: FedKSeedState) -> Sequence[str]:
    """Return what users should hear of the last round: the learning rate that it has chosen."""
    chosen = state.chosen
    if not chosen or chosen["round"] != state.round:
        return ()
    return (
        f"learning rate {chosen['learning_rate']:.3g} chosen from {chosen['measurements']} measurements of "
        f"{chosen['clients']} clients (curvature {chosen['curvature']:.3g}, agreement {chosen['agreement']:.2f})",
    )
