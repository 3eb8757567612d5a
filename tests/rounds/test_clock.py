from __future__ import annotations

from fedtune.messages import Measured, Plan, Traffic, Training
from fedtune.rounds.clock import ClientTime, Clock, CompletedWork, NullClock


def test_a_clients_time_is_that_of_its_parts() -> None:
    assert ClientTime(1.0, 2.0, overhead_s=0.5).seconds == 3.5


def test_the_clock_of_one_machine_says_nothing() -> None:
    plan = Plan("ann", 1, 1.0, Training(batch=1, learning_rate=1.0, steps=1))
    clock: Clock = NullClock()
    assert clock.client_times(1, 0.0, {"ann": CompletedWork(plan, Measured(seconds=9.0), Traffic(), 9.0)}, {}) == {}
    assert clock.overdue({"ann": 9.0}, {}) == {}
