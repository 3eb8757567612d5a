from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.report.compare import compare
from fedtune.report.time_to_target import T_975, Ratio, paired_ratio, time_to, times_to_target
from tests.report.conftest import WriteRun


def curve(*losses: float) -> Any:
    """Lines of test losses, a round of ten seconds each."""

    def edit(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line, loss in zip(lines, losses, strict=True):
            line["test"]["loss"] = loss
            line["clock_s"] = 10.0 * line["round"]

    return edit


def test_the_first_time_at_the_target_counts() -> None:
    clock, losses = np.array([0.0, 4.0, 8.0, 12.0]), np.array([3.0, math.nan, 1.5, 2.5])
    assert time_to(clock, losses, 1.5) == 8
    assert time_to(clock, losses, 3.0) == 0
    assert time_to(clock, losses, 1.0) == math.inf


def test_by_hand_an_interval_of_paired_times() -> None:
    # Ratios 1/2 and 1/8: logarithms -ln 2 and -3 ln 2, mean -2 ln 2, deviation sqrt(2) ln 2, half width 12.706 ln 2.
    found = paired_ratio([1.0, 1.0], [2.0, 8.0])
    assert found.mean == pytest.approx(1 / 4)
    assert found.low == pytest.approx(2 ** -(2 + 12.706))
    assert found.high == pytest.approx(2 ** (12.706 - 2))


def test_one_seed_has_no_interval_and_a_time_of_nothing_no_ratio() -> None:
    found = paired_ratio([3.0], [6.0])
    assert found.mean == pytest.approx(0.5)
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert str(paired_ratio([0.0, 1.0], [1.0, 1.0])) == str(Ratio(math.nan, math.nan, math.nan))
    assert math.isnan(paired_ratio([math.inf, 1.0], [1.0, 1.0]).mean)


@given(st.lists(st.floats(0.1, 1e4), min_size=2, max_size=20), st.floats(0.1, 10))
def test_a_constant_factor_is_found_exactly_whatever_the_seeds_take(seconds: list[float], factor: float) -> None:
    found = paired_ratio([factor * each for each in seconds], seconds)
    assert found.mean == pytest.approx(factor)
    assert found.low == pytest.approx(factor)
    assert found.high == pytest.approx(factor)


def test_more_seeds_narrow_the_interval() -> None:
    assert sorted(T_975, reverse=True) == list(T_975)


def test_the_target_is_where_the_weakest_recipe_ends(write_run: WriteRun) -> None:
    paths = [
        write_run("a0", name="a", seed=0, clients=2, rounds=3, edit=curve(4.0, 3.0, 2.0, 1.0)),
        write_run("a1", name="a", seed=1, clients=2, rounds=3, edit=curve(4.0, 3.5, 3.0, 2.5)),
        write_run("b0", name="b", seed=0, clients=2, rounds=3, edit=curve(4.0, 2.0, 2.1, 2.2)),
        write_run("b1", name="b", seed=1, clients=2, rounds=3, edit=curve(4.0, 2.0, 1.0, 0.5)),
        write_run("b2", name="b", seed=2, clients=2, rounds=3, edit=curve(4.0, 2.0, 1.0, 0.5)),  # a has no such seed
    ]
    targets, (first, second) = times_to_target(compare(paths).groups, lambda curve: curve.test)
    assert targets == {0: 2.2, 1: 2.5}
    assert first.seconds == (20, 30)
    assert second.seconds == (10, 10)
    assert first.ratio == Ratio(1.0, 1.0, 1.0)
    assert second.ratio.mean == pytest.approx(math.sqrt(1 / 2 * 1 / 3))


def test_a_recipe_that_is_best_in_its_first_round_is_not_the_measure_of_the_others(write_run: WriteRun) -> None:
    paths = [
        write_run("early", name="early", clients=2, rounds=3, edit=curve(4.0, 3.0, 3.4, 3.5)),
        write_run("steady", name="steady", clients=2, rounds=3, edit=curve(4.0, 3.8, 3.6, 3.2)),
    ]
    targets, (first, second) = times_to_target(compare(paths).groups, lambda curve: curve.test)
    assert targets == {0: 3.5}
    assert (first.seconds, second.seconds) == ((10,), (30,))


def test_a_seed_in_which_a_recipe_ends_above_its_start_has_no_target(write_run: WriteRun) -> None:
    paths = [
        write_run("worse", name="worse", clients=2, rounds=3, edit=curve(4.0, 3.0, 3.5, 4.1)),
        write_run("steady", name="steady", clients=2, rounds=3, edit=curve(4.0, 3.8, 3.6, 3.2)),
    ]
    assert times_to_target(compare(paths).groups, lambda curve: curve.test) == ({}, ())


def test_a_loss_that_one_recipe_never_measured_gives_nothing(write_run: WriteRun) -> None:
    def unmeasured(lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        for line in lines:
            line["test"] = None

    groups = compare([write_run("a", name="a"), write_run("b", name="b", edit=unmeasured)]).groups
    assert times_to_target(groups, lambda curve: curve.test) == ({}, ())
    assert times_to_target(groups, lambda curve: curve.deployed) == ({}, ())
