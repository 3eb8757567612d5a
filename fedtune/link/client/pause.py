"""The pause that the owner of a device orders: a file in its state folder, which running processes see and obey."""

from __future__ import annotations

import json
import math
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError, Fault
from fedtune.store import files
from fedtune.store.files import store_errors

PAUSE, OVER = "pause", "pause-over"
"""Files of the state folder: the last pause, and which one is over."""
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
MAX_S = 366 * 86_400


@dataclass(frozen=True)
class Clocks:
    """The time by two clocks: the one that people set, and the one that runs from the start of the machine."""

    wall_s: float
    """Seconds since 1970; wrong where nothing has set it."""
    boot_s: float
    """Seconds since the machine has started, those asleep included."""
    boot_id: str
    """Of this start of the machine; empty where the system has none."""


@dataclass(frozen=True)
class Pause:
    """A pause: when it began by both clocks, and how long it lasts."""

    id: str
    seconds: float | None
    """None: until the owner resumes."""
    wall_s: float
    boot_s: float
    boot_id: str

    def left_s(self, now: Clocks) -> float:
        """Return the seconds that are left; 0 if it is over, infinite without an end.

        Within one start of the machine the wall clock does not count: it may be set to any year meanwhile. After a
        restart it does, as far as it has gone forward; one that begins in 1970 again makes a pause no longer than it
        was when it was ordered.
        """
        if self.seconds is None:
            return math.inf
        if self.boot_id and self.boot_id == now.boot_id:
            passed = now.boot_s - self.boot_s
        else:
            passed = max(now.boot_s if now.boot_id else 0.0, now.wall_s - self.wall_s)
        return max(0.0, self.seconds - max(0.0, passed))


def read_clocks() -> Clocks:
    boot_id = ""
    with suppress(OSError):
        boot_id = BOOT_ID.read_text().strip()
    clock = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
    return Clocks(time.time(), time.clock_gettime(clock), boot_id)


def pause(state: Path, seconds: float | None, *, now: Clocks | None = None) -> None:
    """Order a pause of so many seconds, or until `resume`, which survives restarts of the device.

    Raises:
        StoreError: if the state folder cannot be written.
    """
    now = now or read_clocks()
    order = Pause(secrets.token_hex(8), seconds, now.wall_s, now.boot_s, now.boot_id)
    with store_errors(state):
        files.make_private(state, below=state)
    # For all to read, in a folder that is private: root may order the pause of a service that runs as another user.
    files.write_bytes(state / PAUSE, json.dumps(asdict(order)).encode(), mode=0o644)


def resume(state: Path) -> bool:
    """End a pause; returns whether there was one.

    Raises:
        StoreError: if the state folder cannot be written.
    """
    is_paused = read_pause(state) is not None
    with store_errors(state / PAUSE):
        (state / PAUSE).unlink(missing_ok=True)
        if state.is_dir():
            files.sync_folder(state)  # else a power cut could bring the pause back
    return is_paused


def read_pause(state: Path, *, clocks: Callable[[], Clocks] = read_clocks) -> float | None:
    """Return the seconds for which the owner's pause lasts on, infinite without an end; None without a pause.

    Raises:
        StoreError: if the file cannot be read.
    """
    with store_errors(state / PAUSE):
        try:
            order = parse_pause((state / PAUSE).read_bytes())
        except FileNotFoundError:
            return None
    # Half a file is an order all the same: to go on against it would be worse than to wait for `resume`.
    if order is None:
        return math.inf
    with suppress(OSError):
        if (state / OVER).read_text() == order.id:
            return None
    if left := order.left_s(clocks()):
        return left
    # Noted under its id, since another clock after a restart could let it begin again; removed it is not, since the
    # owner may be ordering the next one at this moment.
    with suppress(OSError):
        files.write_private(state / OVER, order.id.encode())
    return None


def parse_pause(data: bytes) -> Pause | None:
    """Return the pause that a file holds; None if it is damaged."""
    try:
        value: Any = json.loads(data)
        seconds = value["seconds"]
        order = Pause(
            str(value["id"]),
            None if seconds is None else float(seconds),
            float(value["wall_s"]),
            float(value["boot_s"]),
            str(value["boot_id"]),
        )
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    numbers = (order.seconds or 0.0, order.wall_s, order.boot_s)
    return order if order.id and all(map(math.isfinite, numbers)) else None


def parse_duration(text: str) -> float:
    """Return the seconds of a text such as "90m", "2h" or "1d".

    Raises:
        ConfigError: if it is none.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,3})?)([smhd])", text.strip(), re.ASCII)
    seconds = float(match[1]) * UNIT_S[match[2]] if match else 0.0
    if not 0 < seconds <= MAX_S:
        raise ConfigError(Fault("--for", 'a time of at most 366 days, such as "90m", "2h" or "1d"', repr(text)))
    return seconds


def seconds_until(text: str, now: datetime) -> float:
    """Return the seconds until the next time that the local clock shows a time of day, such as "22:00".

    Raises:
        ConfigError: if it is none.
    """
    if not (match := re.fullmatch(r"([01]?\d|2[0-3]):([0-5]\d)", text.strip(), re.ASCII)):
        raise ConfigError(Fault("--until", 'a time of day, such as "22:00"', repr(text)))
    then = now.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
    if then <= now:
        then += timedelta(days=1)
    # By timestamps: a night in which the clocks change is an hour shorter or longer.
    return then.timestamp() - now.timestamp()
