"""The guard against divergence of FedKSeed: a round that makes the clients' losses rise is undone at half the rate.

Each client states its loss on the same rows before and after its own steps. Where these rise in the middle client by a
quarter, the steps are too long, and nothing of the round is added. A rise by more than a hundredth there may be noise,
and one by five hundredths in a single client be that client's alone, which the others bear in the mean: then the losses
and the sums of that round are stored, and if the losses are five hundredths above them at the start of a later round,
the sums are set back. A median over clients decides: no client alone can stop a run, or keep it going.
Nothing is stored while the losses fall, so that the states of such runs are as they were without a guard.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fedtune.errors import RoundError
from fedtune.messages import AdmittedUpdate, Training
from fedtune.methods.fedkseed_state import MOST_HALVINGS, FedKSeedState
from fedtune.tensors import Array, Tensors

CALM, RISE, SURGE = 0.01, 0.05, 0.25
"""Rises of a loss: within one client's steps, which noise may be; over rounds, which it is not; and of steps too long
to add. Of runs that went well none rose by more than 0.009 within steps, nor by 0.011 over rounds."""
LOST = 1e3
"""Rise of a client's loss that is finite before its steps and not after them."""
SMALL = 0.4
"""Losses below it count as this large: a rise from 0.01 to 0.02 is noise."""


@dataclass(frozen=True)
class Losses:
    """What the clients of a round state of their own rows, by name."""

    before: Mapping[str, float]
    """At the weights as they were sent."""
    after: Mapping[str, float]
    """After their own steps."""


def losses_of(cohort: Sequence[AdmittedUpdate]) -> Losses:
    """Return the losses of a round; clients that state none, or one alone, are left out where it is needed."""
    before = {one.client: one.measured.loss_before for one in cohort}
    after = {one.client: one.measured.loss_after for one in cohort}
    return Losses(
        {name: loss for name, loss in before.items() if loss is not None},
        {name: loss for name, loss in after.items() if loss is not None},
    )


def rise(old: Mapping[str, float], new: Mapping[str, float]) -> float:
    """Return by which share of itself the loss rose in the middle client; 0 where no client states both."""
    return middle_of([share_of(old[name], new[name]) for name in sorted(old.keys() & new.keys())])


def share_of(old: float, new: float) -> float:
    return (new - old) / max(old, SMALL)


def rises_within(losses: Losses) -> Sequence[float]:
    """Return by which share of itself each client's loss rose within its own steps."""
    before, after = losses.before, losses.after
    return [share_of(before[name], after[name]) if name in after else LOST for name in sorted(before)]


def middle_of(shares: Sequence[float]) -> float:
    """Return the rise of the middle client; 0 without any.

    Of an even number the smaller one in the middle: more than half of the clients must say so.

    >>> middle_of([0.25, 99.0, 0.0])
    0.25
    """
    return sorted(shares)[(len(shares) - 1) // 2] if shares else 0.0


def diverges(state: FedKSeedState, losses: Losses) -> bool:
    """Return whether a round must be undone: its steps were too long, or rounds before it have made the model worse."""
    if not state.guarded:
        return False
    return middle_of(rises_within(losses)) > SURGE or rise(state.watched, losses.before) > RISE


def set_back(state: FedKSeedState, losses: Losses) -> FedKSeedState:
    """Return the state without a round that diverged, at half the learning rate: at the best sums that are known.

    Raises:
        RoundError: if the rate has been halved too often already.
    """
    share = max(rise(state.watched, losses.before), middle_of(rises_within(losses)))
    if state.halvings == MOST_HALVINGS:
        raise RoundError(
            f"round {state.round + 1}: expected the clients' losses to fall at 1/{2**MOST_HALVINGS} of the learning "
            f"rate; got a rise by {share:.0%} in the middle client; start another run with a smaller "
            "client.learning_rate, or descend.learning_rate",
            final=True,
        )
    # Twice as fine: scalars of steps half as long keep their digits.
    finer = state.shift > 0
    drawn = {name: array << int(finer) if name == "sizes" else array for name, array in state.drawn.items()}
    return replace(
        state,
        accumulators={"a": best_sums(state)},
        coarseness=state.coarseness - finer,
        drawn=drawn,
        # A log adds up what rounds have added, which this one has not.
        log={},
        halvings=state.halvings + 1,
        rose={"round": state.round + 1, "share": float(f"{share:.3g}")},
    )


def best_sums(state: FedKSeedState) -> Array:
    """Return the sums to go back to: those that are stored, with zeros for banks that are newer, or the state's own."""
    if not state.best:
        return state.sums
    sums = np.zeros_like(state.sums)
    sums[: len(state.best["a"])] = state.best["a"]
    return sums


def watch(state: FedKSeedState, after: FedKSeedState, losses: Losses) -> FedKSeedState:
    """Return a round's outcome with the losses and sums of its start, where its losses call for a closer look."""
    if not state.guarded:
        return after
    within = rises_within(losses)
    # One client may add what undoes the work of the others, as where one alone probes: no vote, but a closer look.
    calm = middle_of(within) <= CALM and max(within, default=0.0) <= RISE
    better = rise(state.watched, losses.before) <= 0
    if calm and better:
        return replace(after, watched={}, best={})
    if not better:
        return after
    best: Tensors = {"a": state.sums}
    return replace(after, watched={**state.watched, **losses.before}, best=best)


def halve_rate(state: FedKSeedState, training: Training) -> Training:
    """Return a client's training at the rate that is left after rounds that diverged."""
    return replace(training, learning_rate=training.rate * 0.5**state.halvings) if state.halvings else training


def guard_figures(state: FedKSeedState) -> Mapping[str, float]:
    """Return what a round's line notes of rates that were halved; nothing while none was."""
    return {"halvings": state.halvings} if state.halvings else {}


def guard_remarks(state: FedKSeedState) -> Sequence[str]:
    """Return what users should hear of the last round, where it was undone."""
    if not state.rose or state.rose["round"] != state.round:
        return ()
    return (
        f"the loss rose by {state.rose['share']:.0%} in the middle client: the round is not added, the sums are those "
        f"of the best round that is known, and learning rates are halved ({state.halvings} of {MOST_HALVINGS} times)",
    )
