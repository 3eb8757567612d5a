from __future__ import annotations

from dataclasses import replace
from math import cos, inf, pi
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.messages import Assignment, Client, Plan, ProbeSeeds, SeedState, Training, TrainLora
from fedtune.rounds.schedule import (
    Schedule,
    cohort_size,
    enough,
    rate_share,
    rate_text,
    sample,
    scheduled_training,
    with_scheduled_rate,
)


def test_a_cohort_is_drawn_by_number_or_share_and_is_the_same_for_the_same_seed() -> None:
    fleet = [Client(f"client-{i:02}", 1) for i in range(20)]
    five = sample(fleet, 5, seed=0, round=1)
    assert five == sample(fleet, 5, seed=0, round=1)
    assert five == sorted(five, key=lambda client: client.name)
    assert five != sample(fleet, 5, seed=0, round=2)
    assert five != sample(fleet, 5, seed=1, round=1)
    assert len(sample(fleet, 0.25, seed=0, round=1)) == 5
    assert len(sample(fleet, 0.26, seed=0, round=1)) == 6
    assert sample(fleet, None, seed=0, round=1) == fleet
    assert sample(fleet, 99, seed=0, round=1) == fleet
    assert sample(fleet, 1.0, seed=0, round=1) == fleet


def test_every_client_is_drawn_now_and_then() -> None:
    fleet = [Client(f"client-{i}", 1) for i in range(10)]
    drawn = {client.name for round in range(40) for client in sample(fleet, 2, seed=0, round=round)}
    assert len(drawn) == 10


def test_more_are_asked_than_are_needed_as_far_as_there_are_any() -> None:
    fleet = [Client(f"client-{i}", 1) for i in range(10)]
    assert len(sample(fleet, 5, seed=0, round=1, over_select=1.5)) == 8
    assert sample(fleet, 9, seed=0, round=1, over_select=1.5) == fleet


def test_a_round_ends_when_all_have_answered_unless_more_are_asked_than_are_needed() -> None:
    assert enough(7, Schedule(1, cohort=5)) == inf
    assert enough(7, Schedule(1, cohort=5, over_select=1.5)) == 5
    assert enough(3, Schedule(1, cohort=5, over_select=1.5)) == 3
    assert enough(1, Schedule(1, cohort=0.1, over_select=1.5)) == 1


@given(st.integers(1, 500), st.floats(0.001, 1.0))
def test_a_share_takes_somebody_and_never_more_than_there_are(fleet: int, share: float) -> None:
    assert 1 <= cohort_size(fleet, share) <= fleet


def shares(schedule: Schedule) -> list[float]:
    return [rate_share(schedule, number) for number in range(1, schedule.count + 1)]


def test_the_rate_of_each_round_by_hand() -> None:
    assert shares(Schedule(3)) == [1.0, 1.0, 1.0]
    assert shares(Schedule(4, warmup=3)) == [0.25, 0.5, 0.75, 1.0]
    assert shares(Schedule(4, schedule="linear")) == [1.0, 0.7, 0.4, 0.1]
    half = pytest.approx(0.2 + 0.8 * (1 + cos(pi / 2)) / 2)
    assert shares(Schedule(4, schedule="cosine", warmup=1, final_rate=0.2)) == [0.5, 1.0, half, 0.2]
    # Of one round, or with one round after the warm-up, that round is the peak and not the end.
    assert shares(Schedule(1, schedule="cosine")) == [1.0]
    assert shares(Schedule(2, schedule="linear", warmup=1)) == [0.5, 1.0]


@given(
    st.builds(
        Schedule,
        count=st.integers(1, 300),
        schedule=st.sampled_from(["constant", "linear", "cosine"]),
        warmup=st.integers(0, 299),
        final_rate=st.floats(1e-3, 1.0),
    )
)
def test_rates_rise_to_the_recipe_s_and_fall_to_the_final_one(schedule: Schedule) -> None:
    schedule = replace(schedule, warmup=min(schedule.warmup, schedule.count - 1))
    rates = shares(schedule)
    rising, falling = rates[: schedule.warmup + 1], rates[schedule.warmup :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert max(rates) == rates[schedule.warmup] == 1.0
    assert min(rates) > 0
    if schedule.schedule != "constant" and len(falling) > 1:
        assert rates[-1] == round(schedule.final_rate, 9)


def order_of(task: Any, number: int) -> Assignment:
    return Assignment("flora", number, 0, Plan("a", 2, 2.0, Training(learning_rate=0.5, steps=1)), task)


def test_an_assignment_gets_the_rate_of_its_round_and_keeps_everything_else() -> None:
    schedule = Schedule(5, schedule="linear", warmup=1, final_rate=0.4)
    order = order_of(TrainLora(a_key=3), 4)
    at_rate = with_scheduled_rate(order, schedule)
    assert at_rate.plan.training.learning_rate == 0.5 * 0.6
    assert replace(at_rate, plan=order.plan) == order
    assert replace(at_rate.plan.training, learning_rate=0.5) == order.plan.training
    assert with_scheduled_rate(order, Schedule(5)) == order


@pytest.mark.parametrize(("calibrate", "rate"), [(True, 0.5), (False, 0.25)])
def test_a_round_that_measures_the_unit_of_scalars_does_so_at_the_full_rate(calibrate: bool, rate: float) -> None:
    state = SeedState("whole", 0, b"", 0, b"")
    task = ProbeSeeds("kron", 64, 0, 20, 0, 1, state, calibrate=calibrate)
    order = order_of(task, 1)
    assert scheduled_training(order.plan.training, Schedule(3, warmup=1), order).learning_rate == rate


def test_a_schedule_is_read_in_words() -> None:
    assert rate_text(2e-4, Schedule(10)) == "0.0002"
    text = rate_text(2e-4, Schedule(10, schedule="linear", warmup=2))
    assert text == "0.0002 from round 3 on, falling to 2e-05 in round 10 (linear)"
