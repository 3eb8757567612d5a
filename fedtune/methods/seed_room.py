"""How far the sums of FedKSeed may still grow: before every round, for the worst that its clients can answer."""

from __future__ import annotations

from math import ceil, log2, sqrt

from fedtune.directions.bank import headroom
from fedtune.directions.downlink import MAX_SCALAR, MAX_SHIFT
from fedtune.directions.numbers import LARGEST_NUMBER
from fedtune.errors import RoundError
from fedtune.messages import Plan, Training
from fedtune.methods.fedkseed_state import FedKSeedState

REACH = 2.0
"""Learning rates by which a step of Adam moves a number, at most, over the steps of a round; most are below one."""
HARDLY = 1.0
"""Root mean square of a base's weights that is large already: by more than steps of this size no client moves them."""


def check_headroom(state: FedKSeedState, plan: Plan) -> None:
    """Raise RoundError before a round in which the sums of a client that probes could leave 32 bits."""
    assert plan.training.steps is not None  # the planner resolves epochs
    if room(state) < growth_of_scalars(state, plan.training.steps):
        raise full(state, f"{plan.training.steps} more scalars")


def largest_shift(state: FedKSeedState, training: Training) -> int:
    """Return the largest shift of the numbers of a client that descends: what honest steps reach, and what there is
    room for if every number is at its bound and on one side.

    Raises:
        RoundError: if there is no room for numbers such as clients have sent already.
    """
    reached = shift = min(MAX_SHIFT, reached_shift(state, training))
    # A client keeps within it while it trains, so that a smaller one costs a step of its length and no update.
    while shift > 0 and room(state) < growth_of_numbers(state, shift):
        shift -= 1
    if shift < min(state.widest, reached) or room(state) < growth_of_numbers(state, shift):
        raise full(state, "the numbers of a client that descends")
    return shift


def reached_shift(state: FedKSeedState, training: Training) -> int:
    """Return the shift that numbers need at most after the planned steps, at rates relative to weights of size one."""
    assert training.steps is not None  # the planner resolves epochs
    rate = training.rate * HARDLY * 2.0**state.exponent / sqrt(state.settings.seeds)
    reach = REACH * training.steps * rate / LARGEST_NUMBER[state.settings.scalar_bits]
    return max(0, ceil(log2(reach))) if reach > 1 else 0


def rounds_left(state: FedKSeedState, steps: int) -> int:
    """Return how many rounds of so many scalars, each at its bound on one side, still fit into 32 bits."""
    return room(state) // growth_of_scalars(state, steps)


def fewest_rounds_left(state: FedKSeedState) -> int | None:
    """Return how many rounds such as the largest so far still fit into 32 bits; None before the first.

    Of clients that probe, as if every scalar were at its bound; of those that descend, as far as the sums have really
    grown, since numbers at their bound on one side are far from what any round sends.
    """
    left = [rounds_left(state, state.longest)] if state.longest else []
    if state.grown:
        left.append(max(0, room(state) - growth_of_numbers(state, state.widest)) // state.grown)
    return min(left, default=None)


def room(state: FedKSeedState) -> int:
    """Return by how much sum |A| at a position may grow in the coming round, with a perturbation on top."""
    return headroom(state.bank, state.sums, amount=state.perturbation if state.probes else 0)


def growth_of_scalars(state: FedKSeedState, steps: int) -> int:
    """Return by how much so many scalars let sum |A| grow, each at its bound and on one side, and the rounding."""
    return (MAX_SCALAR * steps << state.shift) + state.settings.seeds // 2


def growth_of_numbers(state: FedKSeedState, shift: int) -> int:
    """Return the same of K numbers: the groups never meet at one position."""
    seeds = state.settings.seeds
    return (LARGEST_NUMBER[state.settings.scalar_bits] * seeds << shift) + seeds // 2


def full(state: FedKSeedState, what: str) -> RoundError:
    """Return the error of a run whose sums have no room left."""
    # Where no client probes, the unit does not follow from the step of a scalar.
    instead = "larger method.scalar_step" if state.probes else "smaller descend.learning_rate"
    return RoundError(
        f"round {state.round + 1}: expected room for {what} in sums of 32 bits; got "
        f"sum |A| = {state.bank.span(state.sums)} with e = {state.exponent}; export the model and start a new run "
        f"from it, or start again with a {instead}",
        final=True,
    )
