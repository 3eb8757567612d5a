from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.planning.importance import LARGEST_CLAIM, Report, pool, random_shares, uniform, weighted_mean

MODULES = ("a", "b", "c", "d")


def test_the_first_reports_are_taken_as_they_are_and_later_ones_by_half() -> None:
    first = pool(None, [Report(10, {"a": 0.7, "b": 0.1, "c": 0.1, "d": 0.1})], MODULES)
    assert first == pytest.approx({"a": 0.7, "b": 0.1, "c": 0.1, "d": 0.1})
    second = pool(first, [Report(10, {"a": 0.1, "b": 0.7, "c": 0.1, "d": 0.1})], MODULES)
    assert second == pytest.approx({"a": 0.4, "b": 0.4, "c": 0.1, "d": 0.1})
    assert pool(second, [], MODULES) == second
    assert pool(None, [], MODULES) is None


def test_a_client_with_few_modules_does_not_shout() -> None:
    """It gives each of its two modules half of its own sum; together they have .5, so it says .25 of each."""
    known = {"a": 0.4, "b": 0.1, "c": 0.3, "d": 0.2}
    after = pool(known, [Report(1, {"a": 0.5, "b": 0.5})], MODULES)
    assert after == pytest.approx({"a": 0.325, "b": 0.175, "c": 0.3, "d": 0.2})


def test_clients_count_by_their_examples() -> None:
    reports = [Report(3, {"a": 0.4, "b": 0.6}), Report(1, {"a": 0.8, "b": 0.2})]
    assert pool(None, reports, ("a", "b")) == pytest.approx({"a": 0.5, "b": 0.5})


def test_a_liar_moves_a_module_by_a_bounded_factor() -> None:
    """Nine clients agree on a twentieth for `a`; the tenth, of as many examples, gives it everything."""
    honest = Report(1, {"a": 0.05, "b": 0.35, "c": 0.3, "d": 0.3})
    liar = Report(1, {"a": 1.0, "b": 0.0, "c": 0.0, "d": 0.0})
    unbounded = (9 * 0.05 + 1.0) / 10
    after = pool(None, [*[honest] * 9, liar], MODULES)
    assert after is not None
    assert unbounded == pytest.approx(0.145)
    # (.9 + .1 * 4) * .05, of a sum that is a little below 1 now.
    assert after["a"] == pytest.approx(0.065 / (0.065 + 0.9 * 0.95))


shares = st.lists(st.floats(0, 1), min_size=4, max_size=4).filter(lambda values: sum(values) > 0.01)


@given(st.lists(shares, min_size=1, max_size=6), shares)
@settings(deadline=None)
def test_it_stays_a_distribution_whatever_is_claimed(claims: list[list[float]], known: list[float]) -> None:
    before = {name: value / sum(known) for name, value in zip(MODULES, known, strict=True)}
    reports = [Report(1 + place, dict(zip(MODULES, claim, strict=True))) for place, claim in enumerate(claims)]
    for start in (None, before):
        after = pool(start, reports, MODULES)
        assert after is not None
        assert sum(after.values()) == pytest.approx(1)
        assert min(after.values()) >= 0
    assert pool(before, reports, MODULES) == pytest.approx(pool(before, reports[::-1], MODULES))


@given(st.lists(st.tuples(st.floats(0.1, 9), st.floats(0, 1)), min_size=3, max_size=9))
@settings(deadline=None)
def test_no_value_counts_more_than_some_medians(values: list[tuple[float, float]]) -> None:
    middle = sorted(value for _, value in values)[len(values) // 2]
    assert weighted_mean(values) <= LARGEST_CLAIM * max(middle, 1e-12) + 1e-12


def test_controls_are_distributions_and_the_random_one_is_of_the_seed() -> None:
    assert sum(uniform(MODULES).values()) == pytest.approx(1)
    assert random_shares(MODULES, 1) == random_shares(MODULES[::-1], 1) != random_shares(MODULES, 2)
    assert sum(random_shares(MODULES, 1).values()) == pytest.approx(1)


def test_a_client_that_states_a_billion_examples_does_not_decide_alone() -> None:
    honest = [Report(10, {"a": 0.8, "b": 0.2}) for _ in range(8)]
    pooled = pool(None, [*honest, Report(1e9, {"a": 0.0, "b": 1.0})], ["a", "b"])
    assert pooled is not None
    assert pooled["a"] > 0.3
