"""Whether a device may work now: by its owner's pause, its power, its battery, and how warm it is."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedtune.errors import ConfigError, Fault
from fedtune.link.client.pause import Clocks, read_clocks, read_pause
from fedtune.link.settings import Policy

SYSTEM = Path("/sys/class")
POLL_S = 1.0
"""Between two looks at the device while it works or waits."""
BATTERY_MARGIN = 3.0
"""Percent above the limit at which work goes on, so that it does not begin and stop with each reading."""
TEMPERATURE_MARGIN_C = 3.0
"""Below the limit, at which work goes on."""
PLAUSIBLE_C = (-40.0, 150.0)
"""Of a temperature; a sensor that is switched off says what it likes."""
MAINS_KINDS = frozenset({"Mains", "USB", "Wireless"})
BATTERY_KINDS = frozenset({"Battery", "UPS"})
FED = frozenset({"Charging", "Full", "Not charging"})
"""States of a battery that nothing draws from."""

PAUSED = "paused by its owner"
NOT_ON_MAINS = "not on mains power"
POWER_UNKNOWN = "not known to be on mains power"
BATTERY_LOW = "not on mains power, and below policy.min_battery"
TOO_WARM = "warmer than policy.max_temperature_c"
OnStep: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class Readings:
    """What a machine tells of itself; None of each thing that it does not."""

    mains: bool | None = None
    battery: float | None = None
    """Percent of all its batteries together."""
    temperature_c: float | None = None
    """Of its hottest part."""


def read_device(system: Path = SYSTEM) -> Readings:
    """Return what the machine tells of itself in the folders of the kernel."""
    return Readings(*read_power(system / "power_supply"), read_temperature(system / "thermal"))


def read_power(folder: Path) -> tuple[bool | None, float | None]:
    """Return whether a machine is on mains power, and the charge of its batteries in percent.

    The kernel's documentation is ABI/testing/sysfs-class-power. Batteries of mice and keyboards, whose scope is
    "Device", do not count.
    """
    plugs, levels, states = list[bool](), list[tuple[float, float]](), list[str]()
    for supply in folders(folder):
        kind = read_text(supply / "type")
        if read_text(supply / "scope") == "Device":
            continue
        if kind in MAINS_KINDS and (online := read_number(supply / "online")) is not None:
            plugs.append(online > 0)
        elif kind in BATTERY_KINDS and read_text(supply / "present") != "0":
            if (percent := read_number(supply / "capacity")) is not None and 0 <= percent <= 100:
                full = read_number(supply / "energy_full") or read_number(supply / "charge_full") or 0.0
                levels.append((percent, full))
            if state := read_text(supply / "status"):
                states.append(state)
    known = [state for state in states if state in FED or state == "Discharging"]
    if any(plugs) or "Charging" in known:
        return True, mean_level(levels)
    # Where nothing speaks of the plug, a battery that is not drained says that there is one.
    mains = False if plugs else (all(state in FED for state in known) if known else None)
    return mains, mean_level(levels)


def mean_level(levels: list[tuple[float, float]]) -> float | None:
    """Return the charge of batteries together, each with what it holds when full; alike where one does not say."""
    if not levels:
        return None
    whole = sum(full for _, full in levels)
    if all(full > 0 for _, full in levels):
        return sum(percent * full for percent, full in levels) / whole
    return sum(percent for percent, _ in levels) / len(levels)


def read_temperature(folder: Path) -> float | None:
    """Return the temperature of the hottest part that the machine tells of, in °C."""
    lowest, highest = PLAUSIBLE_C
    readings = (read_number(zone / "temp") for zone in folders(folder) if zone.name.startswith("thermal_zone"))
    celsius = [reading / 1000 for reading in readings if reading is not None]
    return max((value for value in celsius if lowest < value < highest), default=None)


def folders(folder: Path) -> Iterator[Path]:
    with suppress(OSError):
        yield from sorted(folder.iterdir())


def read_text(path: Path) -> str:
    # A driver may answer any read with an error of its own, such as ENODEV after the plug was drawn.
    with suppress(OSError):
        return path.read_bytes()[:100].decode("ascii", "replace").strip()
    return ""


def read_number(path: Path) -> float | None:
    with suppress(ValueError):
        number = float(read_text(path))
        return number if math.isfinite(number) else None
    return None


class Conditions:
    """The limits of a site on when its machine works, held against what the machine tells.

    Each process has its own: it remembers alone which limit was exceeded, so that work goes on only well within it.
    """

    def __init__(
        self,
        policy: Policy,
        state: Path,
        *,
        system: Path = SYSTEM,
        clocks: Callable[[], Clocks] = read_clocks,
    ) -> None:
        """Bind the limits.

        Args:
            policy: of the site.
            state: its state folder, where a pause lies.
            system: folder in which the kernel tells of the machine.
            clocks: the time.
        """
        self._policy, self._state, self._system, self._clocks = policy, state, system, clocks
        self._is_low = self._is_warm = False

    @property
    def sends_energy(self) -> bool:
        """Whether the energy of a round may leave the site."""
        return self._policy.energy == "send"

    def check(self) -> None:
        """Check that limits which need a reading can be held at all.

        Raises:
            ConfigError: if mains power is required, and the machine tells nothing of it.
        """
        policy, readings = self._policy, read_device(self._system)
        by_battery = policy.min_battery is not None and readings.battery is not None
        if policy.power == "mains" and readings.mains is None and not by_battery:
            expected, hint = "a machine that tells whether it is on mains power", 'set it to "any" if it has no battery'
            raise ConfigError(Fault("policy.power", expected, "one that does not", hint))

    def unknown(self) -> list[str]:
        """Return a sentence for each limit that cannot be held, since the machine tells nothing of it."""
        policy, readings, texts = self._policy, read_device(self._system), list[str]()
        if policy.min_battery is not None and readings.battery is None and not readings.mains:
            texts.append("policy.min_battery: this machine tells of no battery, so it does not count")
        if policy.max_temperature_c is not None and readings.temperature_c is None:
            texts.append("policy.max_temperature_c: this machine tells of no temperature, so it does not count")
        return texts

    def obstacle(self) -> str:
        """Return why the machine may not work now; empty if it may. It is sent to the server: it holds no reading.

        Raises:
            StoreError: if the file of a pause cannot be read.
        """
        if read_pause(self._state, clocks=self._clocks) is not None:
            return PAUSED
        policy = self._policy
        if policy.power == "any" and policy.min_battery is None and policy.max_temperature_c is None:
            return ""
        readings = read_device(self._system)
        return self._power_obstacle(readings) or self._heat_obstacle(readings)

    def _power_obstacle(self, readings: Readings) -> str:
        least = self._policy.min_battery
        if readings.mains or (self._policy.power == "any" and least is None):
            self._is_low = False
            return ""
        if least is not None and readings.battery is not None:
            # At most full: with a limit of 99 a full battery is enough.
            limit = min(100.0, least + BATTERY_MARGIN) if self._is_low else least
            self._is_low = readings.battery < limit
            return BATTERY_LOW if self._is_low else ""
        if self._policy.power == "any":
            return ""  # said once at the start
        return POWER_UNKNOWN if readings.mains is None else NOT_ON_MAINS

    def _heat_obstacle(self, readings: Readings) -> str:
        most = self._policy.max_temperature_c
        if most is None or readings.temperature_c is None:
            self._is_warm = False
            return ""
        limit = most - TEMPERATURE_MARGIN_C if self._is_warm else most
        self._is_warm = readings.temperature_c > limit
        return TOO_WARM if self._is_warm else ""


class StepGate:
    """Stands between the steps of a training, and waits there for as long as the machine may not work."""

    def __init__(
        self,
        conditions: Conditions,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Begin open; `clock` returns seconds from any start, `sleep` waits for so many."""
        self._conditions, self._clock, self._sleep = conditions, clock, sleep
        self._looked_at = float("-inf")
        self.obstacle = ""
        """Why the training waits now; empty while it does not. Read by the thread that says how far it is."""

    def wait(self) -> None:
        """Return at once if the machine may work; else as soon as it may again."""
        # A step may take a millisecond, and a look reads a dozen files.
        if self._clock() - self._looked_at < POLL_S:
            return
        try:
            while obstacle := self._conditions.obstacle():
                self.obstacle = obstacle
                self._sleep(POLL_S)
        finally:
            self.obstacle = ""
        self._looked_at = self._clock()

    def after(self, on_step: OnStep) -> OnStep:
        """Return a function that hears of a step, passes it on, and then waits at the gate."""

        def step(done: int, total: int) -> None:
            on_step(done, total)
            self.wait()

        return step
