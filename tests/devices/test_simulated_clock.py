from __future__ import annotations

from dataclasses import replace
from math import exp, inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.devices.profiles import PROFILES
from fedtune.devices.simulated_clock import Load, SimulatedClock, integrated_seconds
from fedtune.messages import Client, Measured, Plan, Traffic, Training
from fedtune.rounds.clock import ClientTime, CompletedWork

TX2, AGX = PROFILES["tx2"], PROFILES["agx-xavier"]


def load(done: CompletedWork) -> Load:
    return Load(done.measured.tokens / 1e3, 0.0, done.traffic.down, done.traffic.up)


FLEET = SimulatedClock({"ann": TX2, "bob": AGX}, load, seed=0)
PLAN = Plan("ann", 8, 2.0, Training(batch=1, learning_rate=1.0, steps=1))


def test_work_is_integrated_exactly_over_pieces() -> None:
    assert integrated_seconds(0, 10, lambda now: (1.0, 4 - now) if now < 4 else (0.5, inf)) == 16.0
    assert integrated_seconds(3, 0, lambda now: (1.0, inf)) == 0.0


@given(work=st.floats(0.01, 100), share=st.floats(0.01, 0.99), start=st.floats(0, 10))
def test_work_adds_up(work: float, share: float, start: float) -> None:
    def rate(now: float) -> tuple[float, float]:
        slot = int(now // 2)
        return (1.0, 0.5, 2.0)[slot % 3], (slot + 1) * 2 - now

    first = integrated_seconds(start, share * work, rate)
    rest = integrated_seconds(start + first, (1 - share) * work, rate)
    assert first + rest == pytest.approx(integrated_seconds(start, work, rate), rel=1e-6, abs=1e-6)


@given(
    tflop=st.floats(0, 50), more=st.floats(0, 50), bytes_=st.integers(0, 10**7), by=st.sampled_from(["time", "round"])
)
def test_more_work_never_takes_less_time(tflop: float, more: float, bytes_: int, by: str) -> None:
    fleet = replace(FLEET, by=by)  # type: ignore[arg-type]
    one = fleet.client("ann", Load(tflop, 0.0, bytes_, bytes_), round=3, now_s=100.0)
    two = fleet.client("ann", Load(tflop + more, 0.0, bytes_, bytes_), round=3, now_s=100.0)
    assert 0 < one.seconds <= two.seconds * (1 + 1e-9) < inf


def test_reading_the_weights_can_be_what_a_step_waits_for() -> None:
    by_round = replace(FLEET, by="round")
    light = by_round.client("bob", Load(1.0, 0.0, 0, 0), round=1, now_s=0.0)
    heavy = by_round.client("bob", Load(1.0, 1365.0, 0, 0), round=1, now_s=0.0)
    assert heavy.compute_s == pytest.approx(light.compute_s * 10.0 / (1.0 / AGX.tflops))


def test_an_upload_meets_the_bandwidth_of_the_time_at_which_the_work_ends() -> None:
    worked = FLEET.client("ann", Load(200.0, 0.0, 0, 10**6), round=1, now_s=0.0)
    alone = FLEET.client("ann", Load(0.0, 0.0, 0, 10**6), round=1, now_s=worked.compute_s)
    at_once = FLEET.client("ann", Load(0.0, 0.0, 0, 10**6), round=1, now_s=0.0)
    assert worked.transfer_s == pytest.approx(alone.transfer_s)
    assert worked.transfer_s != pytest.approx(at_once.transfer_s, rel=0.01)


def test_the_world_is_the_same_whatever_was_asked_and_whoever_else_takes_part() -> None:
    done = {name: CompletedWork(PLAN, Measured(tokens=900), Traffic(10**5, 10**5), 0.0) for name in ("ann", "bob")}
    both = FLEET.client_times(2, 50.0, done, {})
    assert FLEET.client_times(2, 50.0, {"bob": done["bob"]}, {})["bob"] == both["bob"]
    assert both == FLEET.client_times(2, 50.0, dict(reversed(done.items())), {})
    twice = FLEET.client("ann", Load(1.8, 0.0, 10**5, 10**5), round=2, now_s=50.0)
    assert twice.compute_s == pytest.approx(2 * both["ann"].compute_s, rel=0.01)


def test_host_time_never_counts() -> None:
    slow, quick = (
        FLEET.client_times(1, 0.0, {"ann": CompletedWork(PLAN, Measured(seconds=s, tokens=5), Traffic(1, 1), s)}, {})[
            "ann"
        ]
        for s in (9.0, 1.0)
    )
    assert slow == quick


def test_late_clients_are_dropped_at_the_deadline_or_waited_for_thrice_as_long() -> None:
    deadlines = dict.fromkeys(("ann", "bob", "cyd"), 10.0)
    times = {"ann": ClientTime(5.0, 1.0), "bob": ClientTime(11.0, 1.0), "cyd": ClientTime(30.0, 9.0)}
    assert replace(FLEET, late="drop").overdue(deadlines, times) == {"bob": 10.0, "cyd": 10.0}
    assert FLEET.overdue(deadlines, times) == {"cyd": 30.0}
    assert FLEET.overdue({}, {"ann": ClientTime(1e9, 0.0)}) == {}


def test_the_servers_time_is_the_rounds_and_makes_no_client_late() -> None:
    slow = replace(FLEET, server_s=100.0, late="drop")
    done = {"ann": CompletedWork(PLAN, Measured(tokens=5), Traffic(1, 1), 0.0)}
    times = slow.client_times(1, 0.0, done, {})
    assert times == FLEET.client_times(1, 0.0, done, {})
    assert slow.round_seconds(times) == times["ann"].seconds + 100
    assert slow.overdue({"ann": times["ann"].seconds}, times) == {}


def test_odd_periods_end() -> None:
    odd = replace(PROFILES["tx2"], mode_period_s=10.004)
    fleet = replace(
        FLEET, profiles={"ann": odd}, load=lambda done: Load(tflop=300.0, gigabytes=0.0, bytes_down=1, bytes_up=1)
    )
    assert (
        1000
        < fleet.client_times(1, 0.0, {"ann": CompletedWork(PLAN, Measured(), Traffic(), 0.0)}, {})["ann"].seconds
        < 5000
    )


def test_a_device_is_there_as_often_as_its_profile_says() -> None:
    rare = replace(FLEET, profiles={"ann": replace(PROFILES["tx2"], availability=0.25)})
    there = [rare.reachable(round, "ann") for round in range(400)]
    assert sum(there) / 400 == pytest.approx(0.25, abs=0.06)
    assert all(FLEET.reachable(round, "ann") for round in range(20))


def test_a_probe_says_the_speed_of_the_time_and_takes_at_most_a_second_for_either_part() -> None:
    """By rounds the modes stay as they are for twenty; .05 TFLOP at .27 TFLOP/s or less, and a megabyte."""
    by_round = replace(FLEET, by="round")
    for round in (1, 25, 50):
        for name, profile in (("ann", TX2), ("bob", AGX)):
            probe = by_round.probe(name, round=round, now_s=0.0)
            load = Load(profile.tflops, 0.0, 1e6, 1e6)
            spent = by_round.client(name, load, round=round, now_s=0.0)
            noise = exp(0.1 * 4 + 0.05 * 4)  # of a round's time, and of the probe
            assert probe.s_per_tflop is not None
            assert probe.s_per_mb is not None
            assert 1 / noise < probe.s_per_tflop * profile.tflops / spent.compute_s < noise
            assert 1 / noise < 2 * probe.s_per_mb / (spent.transfer_s - 2 * profile.latency_s) < noise
            assert probe.seconds <= 2.0 + profile.latency_s
            short = by_round.probe(name, round=round, now_s=0.0, limit_s=0.01)
            assert short == replace(probe, seconds=short.seconds)
            assert short.seconds <= 0.02 + profile.latency_s
            assert probe == by_round.probe(name, round=round, now_s=0.0)  # common random numbers
    assert by_round.probes(1, 0.0, [Client("bob", 8)], 1.0) == {"bob": by_round.probe("bob", round=1, now_s=0.0)}
    fast = by_round.probe("bob", round=1, now_s=0.0)
    assert fast.seconds < by_round.probe("ann", round=1, now_s=0.0).seconds + 1.0


def test_by_hand_the_energy_of_a_round_is_power_times_time() -> None:
    phone = replace(PROFILES["phone-low"], compute_w=3.0, send_w=2.0, receive_w=1.0)
    fleet = replace(FLEET, profiles={"ann": phone})
    spent = fleet.client("ann", Load(0.01, 0.0, 10**6, 10**5), round=1, now_s=0.0)
    assert spent.down_s is not None
    up_s = spent.transfer_s - spent.down_s
    assert spent.joules == pytest.approx(3 * (spent.compute_s + spent.overhead_s) + 1 * spent.down_s + 2 * up_s)
    assert FLEET.client("ann", Load(0.01, 0.0, 10**6, 10**5), round=1, now_s=0.0).joules is None
