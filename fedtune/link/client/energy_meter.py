"""How much energy a machine takes while a request is under way, where its kernel counts it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fedtune.link.client.conditions import BATTERY_KINDS, SYSTEM, folders, read_number, read_text

METERED = ("package", "dram")
"""Zones of RAPL that are added up: processors and their memory; `psys` and `core` would count the same twice."""
SECOND_DOOR = "intel-rapl-mmio"
"""Folders of zones that count a package which `intel-rapl` counts too, read in another way."""
LONGEST_S = 60.0
"""Between two readings of a battery, of which nothing is known in between."""


@dataclass(frozen=True)
class EnergyReading:
    """What the machine tells of its energy at one moment."""

    at_s: float
    counters: Mapping[str, tuple[float, float]]
    """By zone of RAPL: microjoules so far, and at how many it begins again."""
    battery_w: float | None
    """What the batteries give; None on mains power, and where they do not say."""


def read_energy(system: Path = SYSTEM, clock: Callable[[], float] = time.monotonic) -> EnergyReading:
    """Return what the machine tells of its energy in the folders of the kernel."""
    counters = {}
    for zone in folders(system / "powercap"):
        count, range_uj = read_number(zone / "energy_uj"), read_number(zone / "max_energy_range_uj")
        # Root alone may read a counter on most machines.
        if count is not None and range_uj and read_text(zone / "name").startswith(METERED):
            counters[zone.name] = (count, range_uj)
    once = {zone: counter for zone, counter in counters.items() if not zone.startswith(SECOND_DOOR)}
    return EnergyReading(clock(), once or counters, read_battery_power(system / "power_supply"))


def read_battery_power(folder: Path) -> float | None:
    """Return the watts that all batteries of the machine give, if one is drained and each says how much it gives."""
    watts = list[float | None]()
    for supply in folders(folder):
        if read_text(supply / "type") not in BATTERY_KINDS or read_text(supply / "scope") == "Device":
            continue
        state = read_text(supply / "status")
        if state == "Charging":
            return None  # the plug gives the rest
        if state == "Discharging":
            watts.append(battery_watts(supply))
    known = [value for value in watts if value is not None]
    return sum(known) if known and len(known) == len(watts) else None


def battery_watts(supply: Path) -> float | None:
    power = read_number(supply / "power_now")
    if power is None:
        current, voltage = read_number(supply / "current_now"), read_number(supply / "voltage_now")
        power = None if current is None or voltage is None else current * voltage / 1e6
    # Some drivers say a current that flows out with a minus. A power of 0 is that of a driver that does not measure.
    return abs(power) / 1e6 if power else None


def joules_between(first: EnergyReading, second: EnergyReading) -> float | None:
    """Return the energy between two readings; None where it is not known.

    Counters of processor and memory count exactly and leave out screen and radio; a battery, while it is drained, says
    the power of all at two moments.
    """
    if first.battery_w is not None and second.battery_w is not None:
        seconds = second.at_s - first.at_s
        return 0.5 * (first.battery_w + second.battery_w) * seconds if seconds <= LONGEST_S else None
    if not first.counters or first.counters.keys() != second.counters.keys():
        return None
    return sum((second.counters[name][0] - count) % limit for name, (count, limit) in first.counters.items()) / 1e6


class EnergyMeter:
    """Adds up the energy of a request from readings every few seconds, between which no counter begins again twice."""

    def __init__(self, read: Callable[[], EnergyReading] = read_energy) -> None:
        """Read the machine by `read`."""
        self._read, self._lock = read, threading.Lock()
        self._last: EnergyReading | None = None
        self._joules: float | None = 0.0

    def begin(self) -> None:
        """Begin a request."""
        with self._lock:
            self._last, self._joules = self._read(), 0.0

    def sample(self, *, works: bool = True) -> None:
        """Add what was taken since the last reading, unless the machine only waited."""
        with self._lock:
            now = self._read()
            if works and self._last is not None and self._joules is not None:
                more = joules_between(self._last, now)
                # A gap in the middle: a sum of the rest would pass for the whole.
                self._joules = None if more is None else self._joules + more
            self._last = now

    def joules(self) -> float | None:
        """Return the energy of the request so far; None where the machine did not tell all of it."""
        self.sample()
        return self._joules
