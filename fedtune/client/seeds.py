"""A client's work along seeds: it measures losses, or descends where a backward pass fits into its memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial

import torch

from fedtune.data.encode import Example
from fedtune.directions.bank import DirectionBank, displacement
from fedtune.directions.consistency import Displacement
from fedtune.directions.kron import Kron
from fedtune.directions.rebuild_torch import displacement as torch_displacement
from fedtune.directions.rebuild_torch import fastest, rebuild_compiled
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.errors import ClientError
from fedtune.messages import OUT_OF_MEMORY, Assignment, ClientUpdate, DescendSeeds
from fedtune.model.base import Base
from fedtune.model.batches import Batch, collate
from fedtune.model.descend import at_dense_slope
from fedtune.model.descend_memory import check_free, free_bytes, report_out_of_memory, step_bytes
from fedtune.model.kron_descent import at_kron_slope
from fedtune.model.probe import measured_position
from fedtune.model.train import peak_bytes
from fedtune.probing.answer import Prober, measure_seeds
from fedtune.probing.descent import Slope
from fedtune.probing.descent_answer import descend_seeds
from fedtune.probing.replica import Replicas
from fedtune.probing.steps import OnStep, no_steps
from fedtune.tensors import DTYPES

OpenSlope = Callable[[SeedLedger, Sequence[int]], AbstractContextManager[Slope[Batch]]]

LOGGER = logging.getLogger("fedtune.client")


def work_along_seeds(
    base: Base,
    examples: Sequence[Example],
    assignment: Assignment,
    replicas: Replicas,
    held_out: Sequence[Example] = (),
    on_step: OnStep = no_steps,
    *,
    max_bytes: int | None = None,
) -> ClientUpdate:
    """Return the update of a client that probes, or descends; one that lacks the memory to descend probes if it may.

    Raises:
        ClientError: if the client holds no example, the training fails, or memory does not suffice.
        ConfigError: if the base has no tensors such as are to be moved.
        RoundError: if the accumulators could leave 32 bits.
        WireError: if accumulators that were sent are not those that they are said to be.
    """
    client, task = assignment.plan.client, assignment.task
    if isinstance(task, DescendSeeds):
        prober = prober_of(base, client=client, batch=assignment.plan.training.batch, max_bytes=max_bytes)
        slope = slope_of(base, examples, assignment, max_bytes=max_bytes)
        try:
            return descend_seeds(prober, slope, examples, assignment, task, replicas, held_out, on_step)
        except ClientError as error:
            if OUT_OF_MEMORY not in str(error) or task.fallback is None:
                raise
            LOGGER.warning("%s; it measures losses along seeds instead, as the order allows", error)
        if base.device.type == "cuda":
            torch.cuda.empty_cache()
        assignment = replace(assignment, plan=replace(assignment.plan, training=task.fallback), task=task.probe)
    prober = prober_of(base, client=client, batch=assignment.plan.training.batch, max_bytes=max_bytes)
    return measure_seeds(prober, examples, assignment, assignment.probe, replicas, held_out, on_step)


def prober_of(base: Base, *, client: str, batch: int, max_bytes: int | None = None) -> Prober[Batch]:
    """Return a base on which torch measures losses along seeds, in a process that may take so many bytes in all."""
    return Prober(
        base.manifest,
        base.matrices,
        collate=lambda examples: collate(examples, base),
        at=measured_position(base, client=client, batch=batch, max_bytes=max_bytes),
        displacement_of=partial(displacement_of, base),
        peak_bytes=lambda: peak_bytes(base.device),
    )


def displacement_of(base: Base, bank: DirectionBank) -> Displacement:
    """Return the way to displacements by which this client rebuilds tensors; for kron, which does not, numpy's."""
    if bank.name == Kron.name:
        return displacement
    if fastest(base.device) is not rebuild_compiled:
        return lambda *args, **named: torch_displacement(*args, **named, device=base.device).cpu().numpy()
    from fedtune.directions import rebuild_numba

    return rebuild_numba.displacement


def slope_of(
    base: Base, examples: Sequence[Example], assignment: Assignment, *, max_bytes: int | None = None
) -> OpenSlope:
    """Return what gives a client a position to descend from; it says in plain words that memory does not suffice.

    Args:
        base: whose weights are moved.
        examples: the client's own.
        assignment: with the training.
        max_bytes: that the process may take in all; None: what the machine has.
    """
    return partial(_slope_of, base, examples, assignment, max_bytes)


@contextmanager
def _slope_of(
    base: Base,
    examples: Sequence[Example],
    assignment: Assignment,
    max_bytes: int | None,
    ledger: SeedLedger,
    trainable: Sequence[int],
) -> Iterator[Slope[Batch]]:
    client, training = assignment.plan.client, assignment.plan.training
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(base.device)
    kron = ledger.bank.name == Kron.name
    entries = [base.manifest.entries[ordinal] for ordinal in trainable]
    written = [entry for entry in entries if not kron or len(entry.shape) < 2]
    copies = [entry.num_parameters * DTYPES[entry.dtype].itemsize for entry in written]

    def check(need: float, what: str) -> None:
        check_free(need, what, free=free_bytes(base.device, max_bytes), client=client)

    with report_out_of_memory(client):
        # Before memory is taken: a process that takes more than there is gets no error, it is killed.
        check(sum(copies), "a copy of the weights that are moved")
        with (at_kron_slope if kron else at_dense_slope)(base, ledger, trainable) as position:
            position.move(ledger.accumulators)
            need = step_bytes(base, examples, training, key=assignment.seed, gradients=max(copies, default=0))
            check(need, "activations and gradients of the largest step")
            yield position
