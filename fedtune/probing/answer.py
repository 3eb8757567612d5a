"""A client's answer to an assignment of FedKSeed, whatever computes its losses: the state and the scalars."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np

from fedtune.data.encode import Example
from fedtune.data.loss_rows import loss_rows, num_loss_rows
from fedtune.directions import sampling as sampling_module
from fedtune.directions.bank import DirectionBank, displacement
from fedtune.directions.consistency import STATE, Displacement, block_checks
from fedtune.directions.seed_ledger import Manifest, SeedLedger
from fedtune.directions.space import directions
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.messages import Assignment, ClientUpdate, Measured, ProbeResult, ProbeSeeds
from fedtune.probing.curvature import measure_curvatures
from fedtune.probing.measure import B, Position, measure
from fedtune.probing.replica import Replicas, restore
from fedtune.probing.steps import OnStep, no_steps
from fedtune.seeds import derive

CALIBRATION = 16
"""Scalars that are measured, at least, to learn how large they are."""


def process_peak_bytes() -> int:
    """Return the most memory that this process has used so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def numpy_displacement(bank: DirectionBank) -> Displacement:
    """Return the way to displacements that needs nothing but numpy; all ways give the same bits."""
    return displacement


@dataclass(frozen=True)
class Prober(Generic[B]):
    """A base on which losses are measured along seeds."""

    manifest: Manifest
    layers: Collection[str]
    """Names of the matrices of linear layers, heads included."""
    collate: Callable[[Sequence[Example]], B]
    """Makes a batch of examples."""
    at: Callable[[SeedLedger, Sequence[int]], AbstractContextManager[Position[B]]]
    """The position of a ledger's weights, of which the tensors with these ordinals are moved, inside a block."""
    displacement_of: Callable[[DirectionBank], Displacement] = numpy_displacement
    """By which a bank's displacements are computed for the checks of some blocks."""
    peak_bytes: Callable[[], int] = process_peak_bytes
    """Highest memory use so far."""


@dataclass(frozen=True)
class Start:
    """The state that a client starts from."""

    ledger: SeedLedger
    ordinals: tuple[int, ...]
    """Of the tensors that are moved."""

    def checks(self, prober: Prober[Any]) -> bytes:
        """Return the checks of some blocks, by which the server sees that both have the same model."""
        displacement_of = prober.displacement_of(self.ledger.bank)
        return block_checks(self.ledger, prober.manifest, self.ordinals, displacement_of)


def measure_seeds(
    prober: Prober[B],
    examples: Sequence[Example],
    assignment: Assignment,
    probe: ProbeSeeds,
    replicas: Replicas,
    held_out: Sequence[Example] = (),
    on_step: OnStep = no_steps,
) -> ClientUpdate:
    """Restore the model's state from the seeds, take steps along more of them, and return the scalars.

    Raises:
        ClientError: if the client holds no example.
        ConfigError: if the base has no tensors such as are to be moved.
        RoundError: if the accumulators could leave 32 bits.
        WireError: if accumulators that were sent are not those that they are said to be.
    """
    name, training = assignment.plan.client, assignment.plan.training
    start = start_of(prober, probe, replicas)
    # Not an error: a client that was away for long lacks the state, and is sent the whole of it.
    if start is None:
        return lost(assignment, len(examples))
    if probe.curvatures:
        return measure_shared(prober, examples, assignment, probe, start, held_out, on_step)
    ledger, bank = start.ledger, start.ledger.bank
    steps, sampling = training.steps, probe.sampling
    if probe.calibrate:
        # Uniform: before there are scalars, no seed has a level by which `pro` could draw it.
        steps, sampling = probe.queries * -(-CALIBRATION // probe.queries), "uniform"
    assert steps is not None  # the message holds a number
    ids = sampling_module.sample_ids(
        derive(assignment.seed, "fedkseed.ids"), steps, bank.seeds, sampling=sampling, levels=probe.levels
    )
    began = time.perf_counter()
    with prober.at(ledger, start.ordinals) as position:
        measurements = measure(
            position,
            prober.collate,
            examples,
            training,
            probe,
            ledger,
            ids,
            key=assignment.seed,
            client=name,
            rows=loss_rows(examples, held_out, name, count=num_loss_rows(steps * training.batch)),
            on_step=on_step,
        )
    measured = Measured(
        seconds=time.perf_counter() - began,
        peak_bytes=prober.peak_bytes(),
        tokens=measurements.tokens,
        loss_before=measurements.loss_before,
        loss_after=measurements.loss_after,
    )
    result = ProbeResult(
        scalars=np.empty(0, np.int8) if probe.calibrate else measurements.scalars,
        state=ledger.digest[:STATE],
        checks=start.checks(prober),
        skipped=measurements.skipped,
        rms=measurements.rms if probe.calibrate else None,
    )
    return ClientUpdate(name, assignment.round, len(examples), result, measured)


def start_of(prober: Prober[B], probe: ProbeSeeds, replicas: Replicas) -> Start | None:
    """Return the state that an order describes, and which tensors it moves; None if the client lacks what it builds on.

    Raises:
        ConfigError: if the base has no tensors such as are to be moved.
        WireError: if accumulators that were sent are not those that they are said to be.
    """
    reach = TensorSelection(probe.bank, probe.trainable, vectors=probe.vectors, embeddings=probe.embeddings)
    ordinals = trainable_ordinals(prober.manifest, reach, prober.layers)
    ledger = restore(
        probe.state,
        bank=directions(probe.bank, probe.seeds, [*probe.earlier, probe.key], probe.groups, ordinals),
        exponent=probe.exponent,
        manifest=prober.manifest.digest,
        sampling=probe.sampling,
        replicas=replicas,
    )
    return Start(ledger, ordinals) if ledger else None


def lost(assignment: Assignment, num_examples: int) -> ClientUpdate:
    """Return the answer of a client that lacks the state of an order, and asks for the whole of it."""
    result = ProbeResult(np.empty(0, np.int8), lost=True)
    return ClientUpdate(assignment.plan.client, assignment.round, num_examples, result)


def measure_shared(
    prober: Prober[B],
    examples: Sequence[Example],
    assignment: Assignment,
    probe: ProbeSeeds,
    start: Start,
    held_out: Sequence[Example],
    on_step: OnStep,
) -> ClientUpdate:
    """Return slopes and curvatures along the directions that all clients share; nothing is moved."""
    name, batch, ledger = assignment.plan.client, assignment.plan.training.batch, start.ledger
    began = time.perf_counter()
    with prober.at(ledger, start.ordinals) as position:
        curves = measure_curvatures(
            position,
            prober.collate,
            examples,
            batch,
            probe,
            key=assignment.seed,
            client=name,
            rows=loss_rows(examples, held_out, name, count=num_loss_rows(sampling_module.SHARED * batch)),
            on_step=on_step,
        )
    seconds, peak = time.perf_counter() - began, prober.peak_bytes()
    result = ProbeResult(
        scalars=np.empty(0, np.int8),
        state=ledger.digest[:STATE],
        checks=start.checks(prober),
        skipped=curves.skipped,
        slopes=curves.slopes,
        curvatures=curves.curvatures,
    )
    # The loss after is that before.
    measured = Measured(seconds, peak, curves.tokens, loss_before=curves.loss, loss_after=curves.loss)
    return ClientUpdate(name, assignment.round, len(examples), result, measured)
