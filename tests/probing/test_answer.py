"""A client's answer along seeds, with losses that are a script: the state, the checks, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from fedtune.directions.bank import BANKS, displacement
from fedtune.directions.consistency import STATE, block_checks
from fedtune.directions.downlink import encode_changed
from fedtune.directions.seed_ledger import Manifest, SeedLedger, TensorEntry
from fedtune.errors import WireError
from fedtune.messages import Assignment, Plan, ProbeResult, SeedState
from fedtune.probing.answer import Prober, measure_seeds
from fedtune.probing.replica import Replicas
from fedtune.probing.rows import PaddedRows, pad
from fedtune.probing.steps import Move
from tests.probing.conftest import probe, training

HEAD, NORM = TensorEntry("head.weight", "fp32", (5, 3), bytes(32)), TensorEntry("norm", "fp32", (3,), bytes(32))
MANIFEST = Manifest((HEAD, NORM))
BANK = BANKS["kron"](16, 0)


class Falling:
    """Losses that differ by the seed, and what was moved."""

    def __init__(self) -> None:
        self.moved = list[Move]()
        self.opened = list[tuple[SeedLedger, Sequence[int]]]()

    def losses(self, batch: PaddedRows, moves: Sequence[Move]) -> Sequence[float]:
        return [2.0 + (seed % 3) * amount / 2**12 for seed, amount in moves]

    def move(self, seed: int, amount: int) -> None:
        self.moved.append((seed, amount))

    @contextmanager
    def at(self, ledger: SeedLedger, trainable: Sequence[int]) -> Iterator[Falling]:
        self.opened.append((ledger, trainable))
        yield self


def state(ledger: SeedLedger, before: SeedLedger) -> SeedState:
    data = encode_changed(ledger.accumulators, before.accumulators)
    return SeedState("changed", before.round, data, ledger.round, ledger.digest)


def ledger(round: int, value: int) -> SeedLedger:
    return SeedLedger(BANK, 10, round, MANIFEST.digest, np.full(16, value, np.int32))


def asked(sent: SeedState, **changes: Any) -> Assignment:
    task = probe("kron", state=sent, **changes)
    plan = Plan("ann", rank=1, scale=1.0, training=training(6, batch=2))
    return Assignment("fedkseed", round=sent.round + 1, seed=99, plan=plan, task=task)


def answer(falling: Falling, replicas: Replicas, assignment: Assignment, examples: Any) -> tuple[Any, ProbeResult]:
    prober = Prober(MANIFEST, ["head.weight"], partial(pad, pad_id=0), falling.at)
    update = measure_seeds(prober, examples(5), assignment, assignment.task, replicas)  # type: ignore[arg-type]
    assert isinstance(update.result, ProbeResult)
    return update, update.result


def test_an_answer_states_the_state_checks_it_and_counts_its_work(examples: Any) -> None:
    falling, replicas = Falling(), Replicas()
    update, result = answer(falling, replicas, asked(state(ledger(1, 3), ledger(0, 0))), examples)
    [(restored, trainable)] = falling.opened
    assert trainable == (0,)  # the matrix of a linear layer alone
    assert (restored.round, restored.accumulators.tolist()) == (1, [3] * 16)
    assert result.state == ledger(1, 3).digest[:STATE]
    assert result.checks == block_checks(restored, MANIFEST, trainable, displacement)
    assert len(result.scalars) == 6
    assert result.scalars.any()
    assert sum(1 for scalar in result.scalars if scalar) == len(falling.moved)
    assert (update.client, update.round, update.num_examples) == ("ann", 2, 5)
    assert update.measured.tokens > 0
    assert update.measured.peak_bytes > 2**20
    assert update.measured.loss_before == pytest.approx(2.0)


def test_a_client_that_missed_rounds_follows_by_one_message_and_else_says_that_it_lacks_the_state(
    examples: Any,
) -> None:
    falling, replicas = Falling(), Replicas()
    later = asked(state(ledger(9, 7), ledger(4, 5)))
    _, result = answer(falling, replicas, later, examples)
    assert result.lost
    assert len(result.scalars) == 0
    assert falling.opened == []
    replicas.store(ledger(4, 5))
    _, result = answer(falling, replicas, later, examples)
    assert not result.lost
    assert result.state == ledger(9, 7).digest[:STATE]


def test_a_calibration_measures_and_sends_no_scalar(examples: Any) -> None:
    falling = Falling()
    _, result = answer(falling, Replicas(), asked(state(ledger(0, 0), ledger(0, 0)), calibrate=True), examples)
    assert len(result.scalars) == 0
    assert result.rms is not None
    assert result.rms > 0
    assert falling.moved == []


def test_a_state_of_another_base_is_refused_before_anything_is_opened(examples: Any) -> None:
    falling = Falling()
    sent = state(ledger(1, 3), ledger(0, 0))
    with pytest.raises(WireError, match="expected the state"):
        answer(falling, Replicas(), asked(replace(sent, digest=bytes(32))), examples)
    assert falling.opened == []
