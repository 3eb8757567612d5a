from __future__ import annotations

from dataclasses import replace
from math import exp, isfinite, log
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.planning.policy import Candidate, Probe
from fedtune.planning.rates import (
    NO_RATES,
    Rate,
    Rates,
    expected_rates,
    update_rate,
    update_rates,
    with_lower_bound,
)
from tests.planning.conftest import ARMS, candidate, seen


def compute(clients: dict[str, Rates], *cohort: Candidate, now: int = 2) -> list[float]:
    return list(expected_rates(clients, cohort, "compute", now)[0])


def test_a_deviation_from_the_mean_fades_with_the_rounds() -> None:
    """Mean ln 10, last ln 20, 6.6 rounds at .9: half of the deviation is left, and at last none of it."""
    rate = Rate(log(10), log(20), 5.0, last=4)
    assert exp(rate.forecast(4, 0.9)) == pytest.approx(20)
    assert exp(rate.forecast(4 + 7, 0.9)) == pytest.approx(10 * 2 ** (0.9**7))
    assert exp(rate.forecast(400, 0.9)) == pytest.approx(10)


def test_measurements_by_hand() -> None:
    """10 s, then 20 s for the same work: the mean is over 1.98 of them, and .8 of the rest is taken for the present."""
    first = update_rate(Rate(), 10.0, 1.0, now=1, fades=0.9)
    assert (exp(first.mean), exp(first.recent), first.count) == pytest.approx((10, 10, 1))
    second = update_rate(first, 20.0, 1.0, now=2, fades=0.9)
    assert second.count == pytest.approx(1.98)
    assert second.mean == pytest.approx(log(10) + log(2) / 1.98)
    assert second.recent - second.mean == pytest.approx(0.8 * (log(20) - second.mean))


def test_a_profile_counts_as_half_a_measurement() -> None:
    rate = update_rate(Rate(), 20.0, 1.0, now=1, fades=0.9, prior=5.0)
    assert rate.mean == pytest.approx(log(5) + log(4) / 1.49)


def test_a_missed_deadline_is_a_bound_and_not_a_measurement() -> None:
    known = Rates(Rate(log(20.0), log(20.0), 3.0, 1), Rate(log(10.0), log(10.0), 3.0, 1))
    assert with_lower_bound(known, seen("ann", ARMS[0]), 25.0, 1) == known  # 30 s were expected anyway
    slower = with_lower_bound(known, seen("ann", ARMS[0]), 60.0, 1)
    assert np.exp([slower.compute.mean, slower.transfer.mean]) == pytest.approx([40.0, 20.0])
    assert (slower.compute.count, slower.transfer.count) == (3.0, 3.0)


def test_a_first_miss_never_makes_a_device_faster_than_its_profile() -> None:
    slow = candidate("ann", [100, 50, 25], rate=100.0)
    for late_s, expected in ((2.0, 100.0), (200.0, 200.0)):
        missed = replace(seen("ann", ARMS[0], late_s=late_s), s_per_tflop=100.0, s_per_mb=1e-9)
        rates = update_rates(NO_RATES, missed, 1)
        assert compute({"ann": rates}, slow) == pytest.approx([expected])
        # A bound is no measurement: the first one takes its place, beside the profile.
        again = update_rates(rates, replace(seen("ann", ARMS[0], seconds=80.0), transfer_s=1e-9), 2)
        assert compute({"ann": again}, slow) == pytest.approx([80.0])


def test_of_a_stranger_that_was_given_up_all_of_the_time_is_taken_for_work() -> None:
    rates = update_rates(NO_RATES, seen("ann", ARMS[0], late_s=60.0), 1)
    assert compute({"ann": rates}, replace(candidate("ann", [1]), s_per_tflop=None)) == pytest.approx([60.0])


def test_a_client_that_claims_to_be_infinitely_fast_is_held_to_its_profile() -> None:
    rates = update_rates(NO_RATES, replace(seen("liar", ARMS[0]), compute_s=1e-9, transfer_s=1e-9), 1)
    assert compute({"liar": rates}, candidate("liar", [8]), candidate("bob", [8]))[0] == pytest.approx(0.25)


def test_without_a_profile_a_client_is_taken_to_be_slower_than_most() -> None:
    rates = update_rates(NO_RATES, seen("ann", ARMS[0], seconds=2.0), 1)
    assert compute({"ann": rates}, replace(candidate("new", [1]), s_per_tflop=None)) == pytest.approx([3.0])


@pytest.mark.parametrize("seconds", [1e308, 1e10, float("inf"), float("nan"), -1.0, 0.0])
def test_impossible_times_teach_nothing(seconds: float) -> None:
    assert update_rate(Rate(), seconds, 1.0, now=1) == Rate()


def probed(name: str, s: float | None, **more: Any) -> Candidate:
    return replace(candidate(name, [1.0]), probe=Probe(s, None), **more)


def test_a_probe_counts_within_four_times_the_profile_and_is_named_beyond() -> None:
    cohort = [probed(f"c{i}", s) for i, s in enumerate((0.5, 3.0, 0.001, 1000.0, None))]
    rates, why = expected_rates({}, cohort, "compute", 1)
    assert rates.tolist() == pytest.approx([0.5, 3.0, 0.25, 4.0, 1.0])
    assert [bool(text) for text in why] == [False, False, True, True, False]
    assert why[2] == "its probe claims 250 times the speed that is believed of its device"
    assert why[3] == "its probe claims 250 times the time that is believed of its device"


def test_without_a_profile_a_probe_is_held_to_the_range_of_the_fleet() -> None:
    fleet = {
        f"c{i}": update_rates(NO_RATES, seen(f"c{i}", ARMS[0], seconds=float(s)), 1) for i, s in enumerate((1, 2, 10))
    }
    cohort = [probed("c0", 0.001, s_per_tflop=None), probed("c9", 1e6, s_per_tflop=None)]
    rates, why = expected_rates(fleet, cohort, "compute", 2)
    assert rates.tolist() == pytest.approx([0.25, 40.0])
    assert all(why)


def test_where_nothing_is_known_a_probe_is_held_to_those_of_the_others() -> None:
    cohort = [probed(f"c{i}", s, s_per_tflop=None) for i, s in enumerate((1.0, 1.2, 0.9, 1.1, 1e-6))]
    rates, why = expected_rates({}, cohort, "compute", 1)
    assert rates[4] == pytest.approx(0.9 / 4)
    assert [bool(text) for text in why] == [False] * 4 + [True]


def test_a_probe_is_scaled_by_what_rounds_took_beside_it() -> None:
    """A matrix product runs at thrice the speed of training: known of ann after a round, and taken for bob's too."""
    measured = replace(seen("ann", ARMS[0], seconds=3.0), probe=Probe(1.0, None), s_per_tflop=3.0)
    clients = {"ann": update_rates(NO_RATES, measured, 1)}
    cohort = [probed("ann", 2.0, s_per_tflop=3.0), probed("bob", 1.5, s_per_tflop=3.0)]
    assert compute(clients, *cohort) == pytest.approx([6.0, 4.5])


@given(st.floats(allow_nan=True, allow_infinity=True), st.floats(0.01, 100))
def test_whatever_a_probe_claims_the_rate_is_within_bounds(claim: float, prior: float) -> None:
    rates, _ = expected_rates({}, [probed("ann", claim, s_per_tflop=prior), candidate("bob", [1.0])], "compute", 1)
    assert isfinite(rates[0])
    assert prior / 4 * (1 - 1e-9) <= rates[0] <= 4 * prior * (1 + 1e-9)
