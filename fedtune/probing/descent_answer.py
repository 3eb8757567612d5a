"""A client's answer to an order to descend along seeds: the state that it started from, and its numbers' moves."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from fedtune.data.encode import Example
from fedtune.data.loss_rows import loss_rows, num_loss_rows
from fedtune.directions.consistency import STATE
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.errors import ClientError
from fedtune.messages import Assignment, ClientUpdate, DescendResult, DescendSeeds, Measured
from fedtune.probing.answer import Prober, lost, start_of
from fedtune.probing.descent import Slope, check_examples, descend
from fedtune.probing.measure import B
from fedtune.probing.replica import Replicas
from fedtune.probing.steps import OnStep, no_steps


def descend_seeds(
    prober: Prober[B],
    slope: Callable[[SeedLedger, Sequence[int]], AbstractContextManager[Slope[B]]],
    examples: Sequence[Example],
    assignment: Assignment,
    task: DescendSeeds,
    replicas: Replicas,
    held_out: Sequence[Example] = (),
    on_step: OnStep = no_steps,
) -> ClientUpdate:
    """Restore the model's state from the seeds, take first-order steps on its newest numbers, and return their moves.

    Args:
        prober: the base.
        slope: gives the position of a ledger's weights, of which the tensors with these ordinals are moved.
        examples: the client's own.
        assignment: the order.
        task: of the same.
        replicas: what the client remembers.
        held_out: rows that it trains nothing on.
        on_step: called after each step.

    Raises:
        ClientError: if the client holds no example, too many steps were left out, or the order is not of its bank.
        ConfigError: if the base has no tensors such as are to be moved.
        RoundError: if the accumulators could leave 32 bits.
        WireError: if accumulators that were sent are not those that they are said to be.
    """
    name, training = assignment.plan.client, assignment.plan.training
    start = start_of(prober, task.probe, replicas)
    # Not an error: a client that was away for long lacks the state, and is sent the whole of it.
    if start is None:
        return lost(assignment, len(examples))
    count = len(range(start.ledger.bank.size)[start.ledger.bank.newest])
    if count != task.count:
        raise ClientError(f"{name}: expected an order for the {count} numbers of its bank; got one for {task.count}")
    check_examples(examples, name)
    assert training.steps is not None  # the message holds a number
    began, seen = time.perf_counter(), training.steps * training.batch * training.accumulation
    with slope(start.ledger, start.ordinals) as position:
        descent = descend(
            position,
            prober.collate,
            examples,
            training,
            start.ledger,
            bits=task.bits,
            largest_shift=task.largest_shift,
            key=assignment.seed,
            client=name,
            rows=loss_rows(examples, held_out, name, count=num_loss_rows(seen)),
            on_step=on_step,
        )
    measured = Measured(
        seconds=time.perf_counter() - began,
        peak_bytes=prober.peak_bytes(),
        tokens=descent.tokens,
        loss_before=descent.loss_before,
        loss_after=descent.loss_after,
    )
    result = DescendResult(
        numbers=descent.numbers,
        shift=descent.shift,
        bits=task.bits,
        state=start.ledger.digest[:STATE],
        checks=start.checks(prober),
        skipped=descent.skipped,
    )
    return ClientUpdate(name, assignment.round, len(examples), result, measured)
