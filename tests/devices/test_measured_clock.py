from __future__ import annotations

from fedtune.devices.measured_clock import MeasuredClock
from fedtune.messages import Measured, Plan, Traffic, Training
from fedtune.rounds.clock import ClientTime, CompletedWork

PLAN = Plan("ann", 8, 2.0, Training(batch=1, learning_rate=1.0, steps=1))


def test_what_is_left_of_the_time_until_the_answer_was_transfer() -> None:
    done = {
        "ann": CompletedWork(PLAN, Measured(seconds=4.0), Traffic(), arrived_s=6.0),
        "liar": CompletedWork(PLAN, Measured(seconds=9.0), Traffic(), arrived_s=6.0),
    }
    found = MeasuredClock().client_times(1, 0.0, done, {})
    assert found == {"ann": ClientTime(4.0, 2.0), "liar": ClientTime(6.0, 0.0)}
    assert MeasuredClock().overdue({"ann": 1.0}, found) == {}


def test_the_energy_that_a_client_has_sent_is_recorded_and_none_that_it_kept() -> None:
    done = {
        "ann": CompletedWork(PLAN, Measured(seconds=4.0, joules=12.5), Traffic(), arrived_s=6.0),
        "bob": CompletedWork(PLAN, Measured(seconds=4.0), Traffic(), arrived_s=6.0),
    }
    found = MeasuredClock().client_times(1, 0.0, done, {})
    assert (found["ann"].joules, found["bob"].joules) == (12.5, None)


def test_who_was_given_up_is_known_to_have_taken_so_long_and_what_came_before_a_resume_teaches_nothing() -> None:
    done = {"ann": CompletedWork(PLAN, Measured(seconds=4.0), Traffic(), arrived_s=None)}
    found = MeasuredClock().client_times(1, 0.0, done, {"bob": 30.0})
    assert found == {"bob": ClientTime.until_deadline(30.0)}
    assert MeasuredClock().round_seconds(found) == 30.0
