"""Aggregation that no update can break: where the next state would not be finite, the update that does it is refused.

Admission looks at one update at a time. Two that are harmless alone may leave float32 together, and so may one on top
of what earlier rounds have added up. Nothing of this is written down: which update is refused follows from the state
and the updates alone, so a round that is done again after a crash refuses the same ones and comes out the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite, sqrt
from typing import Any, Protocol

import numpy as np

from fedtune.errors import NotFiniteError, RoundError, ShapeError
from fedtune.messages import AdmittedUpdate, Blueprint, Failure, PlannedClient, TrainLora
from fedtune.methods import serialization as states
from fedtune.methods.method import Method
from fedtune.number_formats import from_wire
from fedtune.rounds.admission import LARGEST
from fedtune.tensors import Array, Tensors, squared_norm

NUMERIC = (ArithmeticError, ValueError, ShapeError, NotFiniteError)
"""What arithmetic raises over numbers that it cannot take; LinAlgError is a ValueError. Other errors are faults of the
method, which no refusal mends."""


class Combining(Protocol):
    """What is read of a run here: a `RoundContext`, or whatever else runs a method."""

    @property
    def method(self) -> Method[Any]: ...
    @property
    def blueprint(self) -> Blueprint: ...


class Asked(Protocol):
    """What is read of a round's request here."""

    @property
    def round(self) -> int: ...
    @property
    def planned(self) -> Mapping[str, PlannedClient]: ...


@dataclass(frozen=True)
class Aggregated:
    """The outcome of aggregating a round."""

    state: Any
    encoded: Sequence[bytes | memoryview]
    """The state as `methods.serialization.encode` makes it."""
    refused: Sequence[Failure] = field(default=())
    """Updates that were left out because the state would not be finite with them, sorted by client."""


def aggregate(
    context: Combining,
    request: Asked,
    state: Any,
    updates: Sequence[AdmittedUpdate],
    norms: Mapping[str, float],
) -> Aggregated:
    """Return the state after a round, without the updates that would keep it from being finite.

    Updates are left out one after the other, the largest first, until the state is finite; then each of them is taken
    back, the smallest first, with which it still is. So one update costs itself alone, however large the others are.

    Args:
        context: of the run.
        request: what the round asked.
        state: before the round.
        updates: admitted, at least one, in cohort order.
        norms: of their changes, by client.

    Raises:
        RoundError: if no update can be used, or memory runs out.
    """
    try:
        whole = attempt(context, request, state, updates)
        if isinstance(whole, Aggregated):
            return whole
        return without_culprits(context, request, state, updates, norms, whole)
    except MemoryError as error:
        # Not the fault of an update: where there is more memory a resume would end in another state.
        raise RoundError(
            f"round {request.round}: expected room to aggregate {len(updates)} updates; memory ran out; "
            "free some and resume the run"
        ) from error


def without_culprits(
    context: Combining,
    request: Asked,
    state: Any,
    updates: Sequence[AdmittedUpdate],
    norms: Mapping[str, float],
    fault: str,
) -> Aggregated:
    """Return the state without the updates that keep it from being finite; `fault` is what it is with all of them."""
    ordered = sorted(updates, key=lambda update: (-size_of(update, norms), update.client))
    used: Sequence[AdmittedUpdate] = ()
    best: Aggregated | None = None
    for count in range(1, len(ordered)):
        outcome = attempt_part(context, request, state, in_order(updates, ordered[count:]))
        if isinstance(outcome, Aggregated):
            used, best = ordered[count:], outcome
            break
    left_out = ordered[: len(ordered) - len(used)]
    # The last one that was left out is the one whose absence mended the sum: it need not be tried again.
    for update in reversed(left_out[:-1] if used else left_out):
        outcome = attempt_part(context, request, state, in_order(updates, [*used, update]))
        if isinstance(outcome, Aggregated):
            used, best = [*used, update], outcome
    if best is None:
        raise nothing_mends(request.round, fault, [update.client for update in ordered])
    names = sorted({update.client for update in updates} - {update.client for update in used})
    return Aggregated(best.state, best.encoded, [refusal(name, fault) for name in names])


def size_of(update: AdmittedUpdate, norms: Mapping[str, float]) -> float:
    size = norms.get(update.client, np.inf)
    return size if isfinite(size) else np.inf


def in_order(updates: Sequence[AdmittedUpdate], chosen: Sequence[AdmittedUpdate]) -> Sequence[AdmittedUpdate]:
    names = {update.client for update in chosen}
    return [update for update in updates if update.client in names]


def attempt(context: Combining, request: Asked, state: Any, updates: Sequence[AdmittedUpdate]) -> Aggregated | str:
    """Return the state with these updates, or why it is of no use."""
    try:
        # What leaves the range of its format is found in the result; a warning beside that would help no one.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            after = context.method.aggregate(state, updates)
            encoded = states.encode(after)
            return why_not_sendable(context, request, after) or Aggregated(after, encoded)
    except NUMERIC as error:
        return str(error) or type(error).__name__


def attempt_part(context: Combining, request: Asked, state: Any, updates: Sequence[AdmittedUpdate]) -> Aggregated | str:
    """Return the same of some of the updates, which may be too few for the method."""
    try:
        return attempt(context, request, state, updates)
    except RoundError as error:
        return str(error)


def why_not_sendable(context: Combining, request: Asked, after: Any) -> str:
    """Return why clients could not go on from a state; empty if they can.

    A finite state may be none in the format it travels in, and two finite factors may have no finite product: then
    every client would fail in every later round, and no resume would help.
    """
    if context.method.task is not TrainLora:
        return ""
    # The widest one: all others are sent parts of the same numbers.
    planned = max(request.planned.values(), key=lambda planned: (planned.plan.rank, -planned.plan.ratio))
    try:
        assignment = context.method.assign(after, context.blueprint.seed, planned)
    except RoundError:
        return ""  # says what the next round lacks, which it will say itself
    for role, sent in assignment.lora.blobs.items():
        tensors = from_wire(sent)
        for name, tensor in tensors.items():
            if (size := largest_product(name, tensor, tensors)) > LARGEST or not isfinite(size):
                return (
                    f"{role}/{name}: expected numbers that clients can train on, at most {LARGEST:.3g}; got {size:.3g}"
                )
    return ""


def largest_product(name: str, tensor: Array, tensors: Tensors) -> float:
    """Return the norm of a tensor, or of a factor b and its product with its a, if that is larger."""
    size = sqrt(squared_norm(tensor))
    partner = tensors.get(f"{name.removesuffix('.b')}.a") if name.endswith(".b") else None
    return size if partner is None else max(size, size * sqrt(squared_norm(partner)))


def refusal(client: str, fault: str) -> Failure:
    """Return the failure of a client without whose update the state is finite."""
    expected = "an update with which the next state is finite"
    return Failure(client, expected=expected, got=f"with it, {fault}", kind="refused", code="NOT_AGGREGATED")


def nothing_mends(round: int, fault: str, tried: Sequence[str]) -> RoundError:
    few = ", ".join(tried[:5]) + f" and {len(tried) - 5} more" * (len(tried) > 5)
    return RoundError(
        f"round {round}: expected a finite state after aggregation; got {fault}; it is not finite without any of "
        f"{few}, largest first, nor with one of them alone; start another run with a smaller client.learning_rate",
        final=True,
    )
