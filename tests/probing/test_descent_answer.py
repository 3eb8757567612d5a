"""A client's answer to an order to descend, with slopes that are a script: the state, the checks, and what it costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from fedtune.directions.consistency import STATE, block_checks
from fedtune.directions.downlink import encode_whole
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.errors import ClientError
from fedtune.messages import Assignment, ClientUpdate, DescendSeeds, Plan, SeedState, Training
from fedtune.probing.answer import Prober, numpy_displacement
from fedtune.probing.descent_answer import descend_seeds
from fedtune.probing.replica import Replicas
from fedtune.probing.rows import PaddedRows, pad
from fedtune.tensors import Array
from tests.probing.conftest import probe
from tests.probing.test_answer import BANK, MANIFEST, ledger

PROBER: Prober[PaddedRows] = Prober(
    MANIFEST, ["head.weight"], collate=partial(pad, pad_id=0), at=lambda *_: pytest.fail("measures nothing")
)


class Sloping:
    """The same slopes everywhere, and where it was opened."""

    rms = 0.25

    def __init__(self) -> None:
        self.opened = list[tuple[SeedLedger, Sequence[int]]]()

    def loss(self, accumulators: Array, batch: PaddedRows) -> float:
        return float(accumulators.sum())

    def slopes(self, accumulators: Array, parts: Sequence[PaddedRows]) -> tuple[float, Array]:
        return 2.0, np.linspace(-1.0, 1.0, 16)

    @contextmanager
    def at(self, start: SeedLedger, trainable: Sequence[int]) -> Iterator[Sloping]:
        self.opened.append((start, trainable))
        yield self


def answer(examples: Sequence[Any], position: Sloping, **changes: Any) -> ClientUpdate:
    start = ledger(2, 7)
    state = SeedState("whole", 0, encode_whole(start.accumulators), 2, start.digest)
    task = replace(DescendSeeds(probe("kron", state=state), 16, 20), **changes)
    plan = Plan("ann", 1, 1.0, Training(batch=1, steps=2, learning_rate=0.125, accumulation=2))
    order = Assignment("fedkseed", 3, 5, plan, task)
    return descend_seeds(PROBER, position.at, examples, order, task, Replicas())


def test_it_states_the_state_and_the_blocks_that_it_started_from(examples: Any) -> None:
    position, start = Sloping(), ledger(2, 7)
    update = answer(examples(3), position)
    assert (update.client, update.round, update.num_examples) == ("ann", 3, 3)
    assert update.descend.state == start.digest[:STATE]
    assert update.descend.checks == block_checks(start, MANIFEST, (0,), numpy_displacement(BANK))
    assert [(opened.digest, tuple(trainable)) for opened, trainable in position.opened] == [(start.digest, (0,))]


def test_it_sends_the_move_and_the_losses_on_both_ends_of_it(examples: Any) -> None:
    update = answer(examples(3), Sloping())
    # 1/8 of rms 1/4 is 32 units of 2^-10, over sqrt(16) numbers 8 each and step; Adam's steps on one slope are equal
    np.testing.assert_array_equal(update.descend.numbers, 16 * np.sign(np.linspace(-1.0, 1.0, 16)))
    assert (update.descend.shift, update.descend.bits, update.descend.skipped) == (0, 8, 0)
    assert (update.measured.loss_before, update.measured.loss_after) == (7 * 16, 7 * 16)
    seen = sum(len(example.input_ids) for example in examples(3)) + len(examples(3)[0].input_ids)
    assert update.measured.tokens > 0.5 * seen


def test_nothing_is_opened_for_an_order_that_cannot_be_done(examples: Any) -> None:
    position = Sloping()
    with pytest.raises(ClientError, match="expected an order for the 16 numbers of its bank; got one for 64"):
        answer(examples(3), position, count=64)
    with pytest.raises(ClientError, match="at least one training example"):
        answer([], position)
    assert position.opened == []
