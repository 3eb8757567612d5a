from __future__ import annotations

from fedtune.messages import Measured, Plan, Traffic, Training
from fedtune.timing import Clock, Done, Spent, Timeless


def test_a_clients_time_is_that_of_its_parts() -> None:
    assert Spent(1.0, 2.0, overhead_s=0.5).seconds == 3.5


def test_the_clock_of_one_machine_says_nothing() -> None:
    plan = Plan("ann", 1, 1.0, Training(batch=1, learning_rate=1.0, steps=1))
    clock: Clock = Timeless()
    assert clock.timed(1, 0.0, {"ann": Done(plan, Measured(seconds=9.0), Traffic(), 9.0)}, {}) == {}
    assert clock.cut({"ann": plan}, {}) == {}
