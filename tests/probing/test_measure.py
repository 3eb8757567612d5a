"""Steps along seeds where the losses are scripted."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from fedtune.directions.bank import BANKS
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.errors import ClientError, RoundError
from fedtune.probing.measure import Measurements, measure
from fedtune.probing.rows import PaddedRows, pad
from fedtune.probing.steps import Move, steps_of
from tests.probing.conftest import probe, training


class Scripted:
    """A position whose losses are a script, and which keeps what it was asked."""

    def __init__(self, *losses: Sequence[float]) -> None:
        self.script = list(losses)
        self.asked: list[Sequence[Move]] = []
        self.moved: list[Move] = []

    def losses(self, batch: PaddedRows, moves: Sequence[Move]) -> Sequence[float]:
        self.asked.append(moves)
        return self.script.pop(0)

    def move(self, seed: int, amount: int) -> None:
        self.moved.append((seed, amount))


Script = Callable[..., tuple[Scripted, Measurements]]


@pytest.fixture
def scripted(examples: Any) -> Script:
    """Measure where losses are a script: what was asked and done, and what came of it."""

    def run(*losses: Sequence[float], drawn: Sequence[int] | None = None, start: int = 0, **changes: Any) -> Any:
        position, asked = Scripted(*losses), probe(**changes)
        count = len(losses) * (asked.queries if asked.estimator == "one-sided" else 1)
        seeds = np.arange(count, dtype=np.int32) if drawn is None else np.array(drawn, np.int32)
        sums = np.array([start] + [0] * 15, np.int32)
        ledger = SeedLedger(BANKS[asked.bank](16, 7), 10, 0, bytes(32), sums)
        found = measure(
            position, partial(pad, pad_id=0), examples(3), training(count), asked, ledger, seeds, key=77, client="ann"
        )
        return position, found

    return run


def test_a_two_sided_step_is_the_slope_times_the_learning_rate_in_units_of_the_wire(scripted: Script) -> None:
    # (2.5 - 2.0) / (2/32) = 8; 0.1 * 8 = 0.8; the step of a scalar is 2^3 * 2^-10 = 1/128; 0.8 * 128 = 102.4
    position, found = scripted([2.5, 2.0], [1.0, 1.0], [2.0, 2.125], drawn=[9, 4, 9])
    assert found.scalars.tolist() == [102, 0, -26]
    assert found.scalars.dtype == np.int8
    assert position.asked == [[(9, -32), (9, 32)], [(4, -32), (4, 32)], [(9, -32), (9, 32)]]
    assert position.moved == [(9, 816), (9, -208)]  # what is zero moves nothing
    assert found.losses == [2.25, 1.0, 2.0625]
    assert found.rms == pytest.approx(math.sqrt((0.8**2 + 0.2**2) / 3))


def test_a_scalar_ends_at_its_bound_and_the_client_moves_by_what_travels(scripted: Script) -> None:
    position, found = scripted([9.0, 0.0], [0.0, 9.0])
    assert found.scalars.tolist() == [127, -127]
    assert position.moved == [(0, 127 * 8), (1, -127 * 8)]


def test_ties_are_rounded_to_the_even_scalar(scripted: Script) -> None:
    # 128 * 0.5 * d * 16 = 1024 d: differences of 1/2048 and 3/2048 are scalars of 0.5 and 1.5 at a rate of 1/2
    assert steps_of([1 / 2048, 0.0], probe(), 0.5, deque()) == [0.5 / 128]
    _, found = scripted([0.5 / 128 / 0.1 / 16, 0.0], [1.5 / 128 / 0.1 / 16, 0.0])
    assert found.scalars.tolist() == [0, 2]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_moves_nothing_and_is_counted(bad: float, scripted: Script) -> None:
    position, found = scripted([2.5, 2.0], [bad, 2.0], [2.0, bad], [2.5, 2.0])
    assert found.scalars.tolist() == [102, 0, 0, 102]
    assert found.skipped == 2
    assert [seed for seed, _ in position.moved] == [0, 3]
    assert found.losses == [2.25, 2.25]
    assert math.isfinite(found.rms)


def test_one_loss_that_is_not_finite_costs_all_queries_of_its_step(scripted: Script) -> None:
    position, found = scripted(
        [1.0, 1.5, math.nan], [1.0, 1.25, 1.0], estimator="one-sided", queries=2, normalise=False
    )
    assert found.skipped == 2
    assert found.scalars.tolist() == [0, 0, 51, 0]  # 0.1 * 0.25 * 32 / 2 * 128 = 51.2
    assert position.asked[1] == [(2, 0), (2, -32), (3, -32)]


def test_nothing_but_losses_that_are_not_finite_is_an_answer_too(scripted: Script) -> None:
    _, found = scripted([math.nan, 1.0], [1.0, math.inf])
    assert (found.scalars.tolist(), found.skipped, found.losses, found.rms) == ([0, 0], 2, [], 0.0)


def test_the_running_clip_is_one_client_s_of_one_round(scripted: Script) -> None:
    spike = [[1.0, 0.99]] * 16 + [[3.0, 0.0]]
    _, found = scripted(*spike, clip=0.0, drawn=[0] * 17)
    assert found.scalars.tolist()[-1] == 4  # 0.1 * 2 * 0.16 * 128 = 4.096, not at its bound
    _, found = scripted(*spike[15:], clip=0.0)
    assert found.scalars.tolist()[-1] == 127


def test_calibration_measures_every_slope_and_moves_nothing(scripted: Script) -> None:
    position, found = scripted([2.5, 2.0], [2.0, 2.125], calibrate=True)
    assert position.moved == []
    assert not found.scalars.any()
    assert found.rms == pytest.approx(math.sqrt((0.8**2 + 0.2**2) / 2))


def test_sums_that_would_leave_32_bits_are_refused_before_they_do(scripted: Script) -> None:
    scripted([9.0, 0.0], start=2**31 - 1 - 1016)
    for room in (1015, 0):  # the sum of the second would be far below zero if it wrapped around
        with pytest.raises(RoundError, match=r"expected sum \|A\| of at most 2147483647"):
            scripted([9.0, 0.0], start=2**31 - 1 - room)


def test_a_client_without_examples_says_so(examples: Any) -> None:
    ledger = SeedLedger(BANKS["kron"](16, 7), 10, 0, bytes(32), np.zeros(16, np.int32))
    with pytest.raises(ClientError, match="ann: expected at least one training example; got none"):
        measure(
            Scripted(),
            partial(pad, pad_id=0),
            [],
            training(1),
            probe(),
            ledger,
            np.zeros(1, np.int32),
            key=1,
            client="ann",
        )
