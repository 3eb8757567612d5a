"""Readings of machines as their kernels give them, whole and damaged, and the limits that are held against them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ConfigError
from fedtune.link.client import conditions, pause
from fedtune.link.client.conditions import (
    BATTERY_LOW,
    NOT_ON_MAINS,
    PAUSED,
    POWER_UNKNOWN,
    TOO_WARM,
    Conditions,
    Readings,
    StepGate,
    read_device,
)
from fedtune.link.settings import Policy

Supply = Mapping[str, str]
PLUG = {"type": "Mains", "online": "1"}
NO_PLUG = {"type": "Mains", "online": "0"}


def battery(percent: object, status: str = "Discharging", **more: str) -> dict[str, str]:
    return {"type": "Battery", "capacity": str(percent), "status": status, **more}


def machine(folder: Path, supplies: Mapping[str, Supply], temperatures: Sequence[object] = ()) -> Path:
    """Write what a kernel would say of a machine; returns the folder to read."""
    for kind in ("power_supply", "thermal"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for name, files in supplies.items():
        (folder / "power_supply" / name).mkdir(exist_ok=True)
        for file, text in files.items():
            (folder / "power_supply" / name / file).write_text(f"{text}\n")
    for number, degrees in enumerate(temperatures):
        (folder / "thermal" / f"thermal_zone{number}").mkdir(exist_ok=True)
        (folder / "thermal" / f"thermal_zone{number}" / "temp").write_text(f"{degrees}\n")
    return folder


@pytest.mark.parametrize(
    ("supplies", "mains", "level"),
    [
        ({}, None, None),
        ({"AC": PLUG}, True, None),
        ({"AC": NO_PLUG, "BAT0": battery(37)}, False, 37),
        ({"AC": PLUG, "BAT0": battery(37, "Charging")}, True, 37),
        # Phones and tablets: nothing of the type Mains.
        ({"usb": {"type": "USB", "online": "1"}, "battery": battery(80, "Full")}, True, 80),
        ({"usb": {"type": "USB", "online": "0"}, "battery": battery(80)}, False, 80),
        # Boards whose kernel speaks of the battery alone.
        ({"battery": battery(50, "Charging")}, True, 50),
        ({"battery": battery(50)}, False, 50),
        ({"battery": battery(50, "Unknown")}, None, 50),
        # One plug of several, as on machines with USB-C.
        ({"ucsi1": {"type": "USB", "online": "0"}, "ucsi2": {"type": "USB", "online": "1"}}, True, None),
        # Two batteries, by what they hold: (10 * 20 + 100 * 60) / 80.
        (
            {
                "BAT0": battery(10, energy_full="20000000"),
                "BAT1": battery(100, "Not charging", energy_full="60000000"),
            },
            False,
            77.5,
        ),
        ({"BAT0": battery(10), "BAT1": battery(100, energy_full="60000000")}, False, 55),
        # The battery of a mouse, and a slot without one.
        ({"AC": PLUG, "mouse": battery(3, scope="Device")}, True, None),
        ({"BAT0": battery(90), "BAT1": battery(0, "Unknown", present="0")}, False, 90),
        ({"ups": {"type": "UPS", "capacity": "70", "status": "Discharging"}}, False, 70),
        # Garbage.
        ({"AC": {"type": "Mains", "online": "yes"}, "BAT0": battery("full")}, False, None),
        ({"BAT0": battery("nan")}, False, None),
        ({"BAT0": battery("1e999", "\x00\xff")}, None, None),
        ({"BAT0": battery(-5), "BAT1": battery(400)}, False, None),
        ({"BAT0": {}}, None, None),
    ],
)
def test_what_kernels_say_of_power(
    tmp_path: Path, supplies: Mapping[str, Supply], mains: bool | None, level: float | None
) -> None:
    assert read_device(machine(tmp_path, supplies)) == Readings(mains, level, None)


@pytest.mark.parametrize(
    ("temperatures", "celsius"),
    [
        ([], None),
        ([45_000, 61_500, 38_000], 61.5),
        (["garbage", 40_000, ""], 40),
        ([0, -274_000, 32_767_000], 0),  # sensors that are switched off
        (["nan", "inf"], None),
    ],
)
def test_the_hottest_part_counts(tmp_path: Path, temperatures: Sequence[object], celsius: float | None) -> None:
    assert read_device(machine(tmp_path, {}, temperatures)).temperature_c == celsius


def test_a_machine_without_these_folders_tells_nothing(tmp_path: Path) -> None:
    assert read_device(tmp_path / "none") == Readings()
    (tmp_path / "power_supply").write_text("a file")
    (tmp_path / "thermal" / "thermal_zone0" / "temp").mkdir(parents=True)
    assert read_device(tmp_path) == Readings()


@given(st.dictionaries(st.sampled_from(["type", "online", "capacity", "status", "energy_full"]), st.text(max_size=8)))
def test_no_text_in_these_files_is_an_error(tmp_path_factory: pytest.TempPathFactory, files: Supply) -> None:
    supplies = {"x": {name: text.replace("\x00", "") for name, text in files.items()}}
    kinds = [{**supplies["x"], "type": kind} for kind in ("Mains", "Battery")]
    folder = tmp_path_factory.mktemp("machine")
    (folder / "power_supply").mkdir()
    for number, supply in enumerate([supplies["x"], *kinds]):
        (folder / "power_supply" / str(number)).mkdir()
        for name, text in supply.items():
            (folder / "power_supply" / str(number) / name).write_text(text, encoding="utf-8", errors="replace")
    readings = read_device(folder)
    assert readings.battery is None or 0 <= readings.battery <= 100


@pytest.mark.parametrize(
    ("policy", "supplies", "expected"),
    [
        (Policy(), {"AC": NO_PLUG, "BAT0": battery(1)}, ""),
        (Policy(power="mains"), {"AC": PLUG, "BAT0": battery(1, "Charging")}, ""),
        (Policy(power="mains"), {"AC": NO_PLUG, "BAT0": battery(99)}, NOT_ON_MAINS),
        (Policy(power="mains"), {}, POWER_UNKNOWN),
        (Policy(power="mains", min_battery=50), {"AC": NO_PLUG, "BAT0": battery(50)}, ""),
        (Policy(power="mains", min_battery=50), {"AC": NO_PLUG, "BAT0": battery(49)}, BATTERY_LOW),
        (Policy(power="mains", min_battery=50), {"BAT0": {"type": "Battery"}}, POWER_UNKNOWN),
        (Policy(min_battery=50), {"AC": NO_PLUG, "BAT0": battery(49)}, BATTERY_LOW),
        (Policy(min_battery=50), {"AC": PLUG, "BAT0": battery(3, "Charging")}, ""),
        (Policy(min_battery=50), {}, ""),
    ],
)
def test_where_a_machine_may_work(
    tmp_path: Path, policy: Policy, supplies: Mapping[str, Supply], expected: str
) -> None:
    assert Conditions(policy, tmp_path, system=machine(tmp_path / "sys", supplies)).obstacle() == expected


def test_a_limit_is_left_by_more_than_it_was_reached(tmp_path: Path) -> None:
    """A battery at the limit, and a chip at its temperature, do not have the work begin and stop with each reading."""

    def run(policy: Policy, readings: Sequence[tuple[Mapping[str, Supply], Sequence[object]]]) -> list[str]:
        limits = Conditions(policy, tmp_path, system=tmp_path / "sys")
        results = []
        for supplies, temperatures in readings:
            machine(tmp_path / "sys", supplies, temperatures)
            results.append(limits.obstacle())
        return results

    levels = [({"AC": NO_PLUG, "BAT0": battery(level)}, ()) for level in (50, 49, 50, 52, 53, 50, 49)]
    low = [BATTERY_LOW if is_low else "" for is_low in (0, 1, 1, 1, 0, 0, 1)]
    assert run(Policy(min_battery=50), levels) == low
    nothing: Mapping[str, Supply] = {}
    warm = [(nothing, [degrees * 1000]) for degrees in (70, 71, 70, 68, 67, 70, 71)]
    assert run(Policy(max_temperature_c=70), warm) == [TOO_WARM if is_warm else "" for is_warm in (0, 1, 1, 1, 0, 0, 1)]
    # Even with the highest limit a full battery is enough.
    full = [({"AC": NO_PLUG, "BAT0": battery(level)}, ()) for level in (99, 100)]
    assert run(Policy(min_battery=100), full) == [BATTERY_LOW, ""]


def test_no_reason_holds_a_reading(tmp_path: Path) -> None:
    """A server that learns how charged a device is knows when its owner is away."""
    policy = Policy(power="mains", min_battery=50, max_temperature_c=60)
    for level in (1, 37, 49):
        for warm in (20_000, 61_234):
            system = machine(tmp_path / "sys", {"AC": NO_PLUG, "BAT0": battery(level)}, [warm])
            assert not any(character.isdigit() for character in Conditions(policy, tmp_path, system=system).obstacle())


def test_mains_power_that_cannot_be_seen_is_refused_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy\.power: expected a machine that tells .*; got one that does not"):
        Conditions(Policy(power="mains"), tmp_path, system=tmp_path).check()
    for policy in (Policy(), Policy(min_battery=50, max_temperature_c=60)):
        Conditions(policy, tmp_path, system=tmp_path).check()
    system = machine(tmp_path / "sys", {"BAT0": battery(50, "Unknown")})
    Conditions(Policy(power="mains", min_battery=40), tmp_path, system=system).check()


def test_what_a_machine_does_not_tell_is_said(tmp_path: Path) -> None:
    policy = Policy(min_battery=50, max_temperature_c=60)
    assert [text.partition(":")[0] for text in Conditions(policy, tmp_path, system=tmp_path).unknown()] == [
        "policy.min_battery",
        "policy.max_temperature_c",
    ]
    system = machine(tmp_path / "sys", {"BAT0": battery(70)}, [40_000])
    assert Conditions(policy, tmp_path, system=system).unknown() == []
    assert Conditions(Policy(), tmp_path, system=tmp_path).unknown() == []


def test_a_pause_comes_before_all_else(tmp_path: Path) -> None:
    limits = Conditions(Policy(), tmp_path, system=tmp_path)
    assert limits.obstacle() == ""
    pause.pause(tmp_path, None)
    assert limits.obstacle() == PAUSED
    pause.resume(tmp_path)
    assert limits.obstacle() == ""


def test_a_training_waits_between_two_steps_until_it_may_go_on(tmp_path: Path) -> None:
    now, slept, heard = [100.0], list[str](), list[tuple[int, int]]()

    def sleep(seconds: float) -> None:
        slept.append(gate.obstacle)
        now[0] += seconds
        if len(slept) == 3:
            pause.resume(tmp_path)

    gate = StepGate(Conditions(Policy(), tmp_path), clock=lambda: now[0], sleep=sleep)
    step = gate.after(lambda done, total: heard.append((done, total)))
    step(1, 4)
    pause.pause(tmp_path, None)
    step(2, 4)  # within a second of the last look
    assert not slept
    now[0] += conditions.POLL_S
    step(3, 4)
    assert slept == [PAUSED] * 3
    assert gate.obstacle == ""
    step(4, 4)
    assert heard == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert len(slept) == 3
