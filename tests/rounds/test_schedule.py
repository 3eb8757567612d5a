from __future__ import annotations

from math import inf

from hypothesis import given
from hypothesis import strategies as st

from fedtune.messages import Client
from fedtune.rounds.schedule import Schedule, cohort_size, enough, sample


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
