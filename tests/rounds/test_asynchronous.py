from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fedtune.rounds.asynchronous import AsyncSettings
from fedtune.rounds.schedule import Schedule


@given(st.integers(0, 1000), st.integers(0, 1000), st.floats(0, 4))
def test_a_discount_is_at_most_1_and_falls_with_what_was_missed(one: int, other: int, exponent: float) -> None:
    settings = AsyncSettings(staleness_exponent=exponent)
    few, many = settings.discount(min(one, other)), settings.discount(max(one, other))
    assert 0 < many <= few <= 1
    assert settings.discount(0) == 1.0


def test_places_are_the_cohort_unless_they_are_given() -> None:
    assert AsyncSettings(buffer=2).working(9, Schedule()) == 9
    assert AsyncSettings(buffer=2).working(9, Schedule(cohort=4)) == 4
    assert AsyncSettings(buffer=2).working(9, Schedule(cohort=0.5, over_select=1.5)) == 8
    assert AsyncSettings(buffer=2, concurrency=20).working(9, Schedule()) == 9


def test_a_round_of_time_needs_as_many_as_any_other_round() -> None:
    assert AsyncSettings(buffer=5).goal(2) == 5
    assert AsyncSettings(trigger="time", budget_s=1.0).goal(2) == 2
