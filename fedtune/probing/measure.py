"""Zeroth-order local training: losses on both sides of the weights along seeded directions, rounded to integers."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from fedtune.data.encode import Example
from fedtune.directions.bank import check_accumulators, perturb
from fedtune.directions.downlink import MAX_SCALAR
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.errors import ClientError
from fedtune.messages import ProbeSeeds, Training
from fedtune.probing.order import batches
from fedtune.probing.steps import CLIP_WINDOW, Move, OnStep, around, finite, no_steps, steps_of
from fedtune.tensors import Array


class Rows(Protocol):
    """What is read of a batch, whatever kind of arrays it holds."""

    @property
    def count(self) -> int:
        """Tokens (causal) or examples (classification) that count in the loss."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens of the examples, padding left out."""
        ...


B = TypeVar("B", bound=Rows)
BatchOf = TypeVar("BatchOf", bound=Rows, contravariant=True)


class Position(Protocol[BatchOf]):
    """A point in the space of weights, as accumulators, and the losses there and around it."""

    def losses(self, batch: BatchOf, moves: Sequence[Move]) -> Sequence[float]:
        """Return the mean loss over what counts in the batch at w(A + amount e_k) for each (k, amount)."""
        ...

    def move(self, seed: int, amount: int) -> None:
        """Add an amount to one accumulator for good."""
        ...


@dataclass(frozen=True)
class Measurements:
    """The results of a client's steps."""

    scalars: Array
    """int8 (steps,), one per seed."""
    skipped: int
    """How many of them are 0 because a loss was not finite."""
    rms: float
    """Root mean square of the unrounded steps, in the weights' own unit."""
    losses: Sequence[float]
    """Mean loss of each step whose losses were finite."""
    loss_before: float | None
    """Mean loss of the rows that were given for it, at the weights as received; None if it is not finite."""
    loss_after: float | None
    """The same after the last step."""
    tokens: int
    """Tokens of the forward passes of the steps, padding left out."""


def measure(
    position: Position[B],
    collate: Callable[[Sequence[Example]], B],
    examples: Sequence[Example],
    training: Training,
    probe: ProbeSeeds,
    ledger: SeedLedger,
    ids: Array,
    *,
    key: int,
    client: str,
    rows: Sequence[Example] = (),
    on_step: OnStep = no_steps,
) -> Measurements:
    """Take one step along every seed; each step is rounded to what the server will add before the next one is taken.

    Args:
        position: of the weights at the ledger's accumulators.
        collate: makes a batch of examples.
        examples: the client's own.
        training: with `steps`, one per seed, `batch` and `learning_rate`.
        probe: perturbation, estimator and scalar step.
        ledger: the weights to start from.
        ids: the seeds in the order in which they are measured, int32 (steps,).
        key: from `derive`; the order of the data follows from it.
        client: for error messages.
        rows: on which the loss is measured before the first step and after the last one; without any it is not.
        on_step: called after each seed, or group of seeds, with the seeds so far.

    Raises:
        ClientError: if there is no example.
        RoundError: if the accumulators could leave 32 bits.
    """
    if not examples:
        raise ClientError(f"{client}: expected at least one training example; got none; give the client more data")
    order = batches(len(examples), size=training.batch, key=key)
    # `step` is the change of a weight by a scalar of 1: a power of two, so that dividing by it is exact.
    sums, step = check_accumulators(ledger.bank, ledger.accumulators), 2.0 ** (probe.shift - probe.exponent)
    sizes = deque[float](maxlen=CLIP_WINDOW)
    scalars, unrounded, losses, skipped, tokens = list[int](), list[float](), list[float](), 0, 0
    # One-sided queries of a group share the batch and the loss at the middle.
    group = probe.queries if probe.estimator == "one-sided" else 1
    loss_before = loss_at(position, collate, rows, training.batch)
    for start in range(0, len(ids), group):
        seeds = ids[start : start + group].tolist()
        batch = collate([examples[i] for i in next(order)])
        moves = around(seeds, probe)
        step_losses = position.losses(batch, moves)
        tokens += len(moves) * batch.tokens
        steps = [math.nan]
        if finite(step_losses):
            steps = steps_of(step_losses, probe, training.rate, sizes)
        if finite(steps):
            losses.append(sum(step_losses) / len(step_losses))
            unrounded += steps
        else:
            # Scalars of 0, not fewer scalars: the server matches them to the ids by their place.
            steps, skipped = [0.0] * len(seeds), skipped + len(seeds)
        for seed, move in zip(seeds, steps, strict=True):
            scalar = 0 if probe.calibrate else max(-MAX_SCALAR, min(MAX_SCALAR, round(move / step)))
            scalars.append(scalar)
            if scalar:
                # Checked at every step: a sum beyond 32 bits would wrap around in the rebuild.
                sums = check_accumulators(ledger.bank, perturb(ledger.bank, sums, seed, scalar << probe.shift))
                position.move(seed, scalar << probe.shift)
        on_step(min(start + group, len(ids)), len(ids))
    return Measurements(
        scalars=np.array(scalars, np.int8),
        skipped=skipped,
        rms=float(np.sqrt(np.mean(np.square(unrounded)))) if unrounded else 0.0,
        losses=losses,
        loss_before=loss_before,
        # A calibration moves nothing.
        loss_after=loss_before if probe.calibrate else loss_at(position, collate, rows, training.batch),
        tokens=tokens,
    )


def loss_at(
    position: Position[B], collate: Callable[[Sequence[Example]], B], rows: Sequence[Example], batch: int
) -> float | None:
    """Return the mean loss of some rows at a position, in nats per token (causal) or example.

    None where nothing of them counts, or a loss is not finite: such steps are skipped, and the client's work is used.
    """
    total, count = 0.0, 0
    for begin in range(0, len(rows), batch):
        part = collate(rows[begin : begin + batch])
        [loss] = position.losses(part, [(0, 0)])  # an amount of 0 stays where it is, whatever the seed
        total, count = total + loss * part.count, count + part.count
    return total / count if count and math.isfinite(total) else None
