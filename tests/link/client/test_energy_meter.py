from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.link.client.energy_meter import EnergyMeter, EnergyReading, joules_between, read_energy

RANGE = 1000.0


def write(folder: Path, files: Mapping[str, object]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def zone(system: Path, folder: str, name: str, count: int) -> None:
    write(system / "powercap" / folder, {"name": name, "energy_uj": count, "max_energy_range_uj": 262_143_328_850})


def battery(system: Path, **files: object) -> None:
    write(system / "power_supply" / "BAT0", {"type": "Battery", "status": "Discharging", **files})


def reading(at_s: float, battery_w: float | None = None, **counters: float) -> EnergyReading:
    return EnergyReading(at_s, {name: (count, RANGE) for name, count in counters.items()}, battery_w)


def test_processors_and_memory_are_read_and_nothing_twice(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 3_000_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 1_000_000)
    zone(tmp_path, "intel-rapl:1", "psys", 9_000_000)
    first = read_energy(tmp_path, lambda: 0.0)
    assert set(first.counters) == {"intel-rapl:0", "intel-rapl:0:1"}
    zone(tmp_path, "intel-rapl:0", "package-0", 7_500_000)
    zone(tmp_path, "intel-rapl:0:1", "dram", 1_250_000)
    assert joules_between(first, read_energy(tmp_path, lambda: 2.0)) == pytest.approx(2.75)


def test_a_package_that_two_interfaces_count_is_added_once(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl-mmio:0", "package-0", 5_000_000)
    assert set(read_energy(tmp_path, lambda: 0.0).counters) == {"intel-rapl-mmio:0"}  # the only one
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    first = read_energy(tmp_path, lambda: 0.0)
    for folder in ("intel-rapl-mmio:0", "intel-rapl:0"):
        zone(tmp_path, folder, "package-0", 7_000_000)
    assert joules_between(first, read_energy(tmp_path, lambda: 2.0)) == pytest.approx(2.0)


def test_a_machine_that_tells_nothing_has_no_joules(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    (tmp_path / "powercap" / "intel-rapl:0" / "energy_uj").chmod(0o000)
    (tmp_path / "powercap" / "intel-rapl:0" / "energy_uj").unlink()  # root reads files of mode 0 as well
    meter = EnergyMeter(lambda: read_energy(tmp_path))
    meter.begin()
    assert meter.joules() is None
    assert read_energy(tmp_path / "none").counters == {}


@given(st.integers(0, 999), st.integers(0, 999))
def test_a_counter_that_began_again_is_read_right(before: int, spent: int) -> None:
    after = (before + spent) % RANGE
    assert joules_between(reading(0, a=before), reading(1, a=after)) == pytest.approx(spent / 1e6)


@pytest.mark.parametrize(
    ("files", "watts"),
    [
        ({"power_now": 4_500_000}, 4.5),
        ({"current_now": -500_000, "voltage_now": 4_000_000}, 2.0),  # some drivers say what flows out with a minus
        ({"power_now": 0}, None),
        ({}, None),
        ({"power_now": 4_500_000, "status": "Charging"}, None),
        ({"power_now": 4_500_000, "status": "Full"}, None),
        ({"power_now": 4_500_000, "scope": "Device"}, None),  # of a mouse
    ],
)
def test_a_battery_counts_while_it_is_drained(tmp_path: Path, files: dict[str, object], watts: float | None) -> None:
    battery(tmp_path, **files)
    assert read_energy(tmp_path).battery_w == watts


def test_one_battery_that_says_nothing_hides_what_the_machine_takes(tmp_path: Path) -> None:
    battery(tmp_path, power_now=4_500_000)
    write(tmp_path / "power_supply" / "BAT1", {"type": "Battery", "status": "Discharging"})
    assert read_energy(tmp_path).battery_w is None


def metered(*readings: EnergyReading) -> EnergyMeter:
    rest = iter(readings)
    return EnergyMeter(lambda: next(rest))


def test_by_hand_a_request_is_the_sum_of_its_parts_without_its_pauses() -> None:
    meter = metered(reading(0, 2.0), reading(5, 4.0), reading(25, 9.0), reading(30, 5.0))
    meter.begin()
    meter.sample()  # 3 W for 5 s
    meter.sample(works=False)  # the machine waited for its owner
    assert meter.joules() == 15.0 + 7.0 * 5


def test_a_gap_leaves_a_request_without_joules() -> None:
    meter = metered(reading(0, a=1), reading(5), reading(10, a=3), reading(12, a=3), reading(13, a=4))
    meter.begin()
    meter.sample()
    assert meter.joules() is None
    meter.begin()
    assert meter.joules() == pytest.approx(1e-6)  # the next one is counted again


def test_a_battery_of_which_nothing_is_known_for_minutes_is_not_believed() -> None:
    assert joules_between(reading(0, 2.0), reading(300, 2.0)) is None
