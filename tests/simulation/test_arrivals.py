from __future__ import annotations

from fedtune.round import Measured, Plan, Traffic, Training
from fedtune.simulation.arrivals import Arrivals
from fedtune.timing import Done, Spent

PLAN = Plan("ann", 8, 2.0, Training(batch=1, learning_rate=1.0, steps=1))


def test_what_is_left_of_the_time_until_the_answer_was_transfer() -> None:
    done = {
        "ann": Done(PLAN, Measured(seconds=4.0), Traffic(), arrived_s=6.0),
        "liar": Done(PLAN, Measured(seconds=9.0), Traffic(), arrived_s=6.0),
    }
    found = Arrivals().timed(1, 0.0, done)
    assert found == {"ann": Spent(4.0, 2.0), "liar": Spent(9.0, 0.0)}
    assert Arrivals().cut({"ann": PLAN}, found) == {}
