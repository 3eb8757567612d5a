from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.devices import traces
from fedtune.devices.profiles import PROFILES

TX2 = PROFILES["tx2"]


def test_every_slot_can_be_asked_for_alone_and_is_the_same_each_time() -> None:
    forward = [traces.log_deviation(0, "ann", slot) for slot in range(150)]
    assert [traces.log_deviation(0, "ann", slot) for slot in reversed(range(150))] == forward[::-1]
    assert forward != [traces.log_deviation(1, "ann", slot) for slot in range(150)]
    assert forward != [traces.log_deviation(0, "bob", slot) for slot in range(150)]


def test_the_bandwidth_has_the_deviation_and_the_memory_that_it_should() -> None:
    z = np.array([[traces.log_deviation(seed, "ann", slot) for slot in range(60)] for seed in range(40)])
    assert z.std() == pytest.approx(0.275, abs=0.03)
    pairs = np.corrcoef(z[:, :-1].ravel(), z[:, 1:].ravel())[0, 1]
    assert pairs == pytest.approx(0.9, abs=0.03)


def test_the_bandwidth_stays_within_what_is_possible() -> None:
    found = [traces.bandwidth_mbps(10.0, 0.5, seed, "ann", slot) for seed in range(40) for slot in range(5)]
    assert min(found) >= 2.0
    assert max(found) <= 30.0
    fast = [traces.bandwidth_mbps(100.0, 0.5, seed, "ann", 0) for seed in range(40)]
    assert 20.0 <= min(fast) < 90 < 110 < max(fast) <= 300.0  # a profile's own mean counts


def test_modes_are_those_of_the_profile_and_last_a_period() -> None:
    at = traces.speed(TX2, 0, "ann", by="time", round=1)
    assert at(0.0)[0] == at(1199.0)[0]
    assert at(1150.0)[1] == pytest.approx(50.0)
    assert {at(1200.0 * slot)[0] for slot in range(40)} == set(TX2.modes)


@given(n=st.integers(0, 10**7), length=st.sampled_from([0.1, 1.1, 10.004, 60.0, 1200.0]))
def test_time_never_stands_still_at_the_end_of_a_slot(n: int, length: float) -> None:
    now = n * length
    slot, lasts = traces.slot_at(now, length)
    assert lasts > 0
    assert slot in (n - 1, n, n + 1)
    assert now + lasts == pytest.approx((slot + 1) * length)


def test_by_round_nothing_depends_on_the_time() -> None:
    modes = [traces.speed(TX2, 0, "ann", by="round", round=round)(0.0) for round in range(1, 41)]
    assert len({mode for mode, _ in modes[:20]}) == len({mode for mode, _ in modes[20:]}) == 1
    assert modes[0][1] == float("inf")
    one = traces.bandwidth(10.0, 0.5, 0, "ann", by="round", round=7)
    assert one(0.0) == one(1e6)


def test_noise_is_around_one_and_availability_a_share() -> None:
    noise = [traces.noise(0, f"c{i}", 1) for i in range(300)]
    assert float(np.std(np.log(noise))) == pytest.approx(0.1, abs=0.02)
    rare = replace(TX2, availability=0.25)
    there = [traces.available(rare, 0, f"c{i}", 1) for i in range(400)]
    assert sum(there) / 400 == pytest.approx(0.25, abs=0.06)
    assert traces.available(TX2, 0, "ann", 1)
