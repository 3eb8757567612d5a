"""A client's answer to an assignment of FedKSeed, whatever computes its losses: the state and the scalars."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Generic

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
    reach = TensorSelection(probe.bank, probe.trainable, vectors=probe.vectors, embeddings=probe.embeddings)
    ordinals = trainable_ordinals(prober.manifest, reach, prober.layers)
    bank = directions(probe.bank, probe.seeds, [*probe.earlier, probe.key], probe.groups, ordinals)
    update = partial(ClientUpdate, name, assignment.round, len(examples))
    ledger = restore(
        probe.state,
        bank=bank,
        exponent=probe.exponent,
        manifest=prober.manifest.digest,
        sampling=probe.sampling,
        replicas=replicas,
    )
    # Not an error: a client that was away for long lacks the state, and is sent the whole of it.
    if ledger is None:
        return update(ProbeResult(np.empty(0, np.int8), lost=True))
    steps, sampling = training.steps, probe.sampling
    if probe.calibrate:
        # Uniform: before there are scalars, no seed has a level by which `pro` could draw it.
        steps, sampling = probe.queries * -(-CALIBRATION // probe.queries), "uniform"
    assert steps is not None  # the message holds a number
    ids = sampling_module.sample_ids(
        derive(assignment.seed, "fedkseed.ids"), steps, bank.seeds, sampling=sampling, levels=probe.levels
    )
    began = time.perf_counter()
    with prober.at(ledger, ordinals) as position:
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
    return update(
        ProbeResult(
            scalars=np.empty(0, np.int8) if probe.calibrate else measurements.scalars,
            state=ledger.digest[:STATE],
            checks=block_checks(ledger, prober.manifest, ordinals, prober.displacement_of(bank)),
            skipped=measurements.skipped,
            rms=measurements.rms if probe.calibrate else None,
        ),
        measured,
    )
