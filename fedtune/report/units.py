"""Bytes, seconds and losses as texts with units and few digits."""

from __future__ import annotations

import math

NOTHING = "\N{EN DASH}"
"""Shown where a number was not measured."""

_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_JOULES = ((1e6, "MJ"), (1e3, "kJ"), (1.0, "J"))
_SECONDS = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"), (1.0, "s"))


def bytes_unit(largest: float) -> tuple[float, str]:
    """Return the decimal unit in which `largest` is at least 1: its size in bytes and its name (1 MB = 10^6 bytes)."""
    return next((unit for unit in _BYTES if largest >= unit[0]), _BYTES[-1])


def seconds_unit(largest: float) -> tuple[float, str]:
    """Return the unit of time of which `largest` is at least two."""
    return next((unit for unit in _SECONDS if largest >= 2 * unit[0]), _SECONDS[-1])


def bytes_text(count: float | None) -> str:
    """Return bytes in the decimal unit that fits.

    >>> bytes_text(2_345_678)
    '2.35 MB'
    """
    if count is None:
        return NOTHING
    size, unit = bytes_unit(abs(count))
    return f"{count / size:.0f} B" if unit == "B" else f"{count / size:.3g} {unit}"


def joules_unit(largest: float) -> tuple[float, str]:
    """Return the unit of energy in which `largest` is at least 1: its size in joules and its name."""
    return next((unit for unit in _JOULES if largest >= unit[0]), _JOULES[-1])


def joules_text(joules: float | None) -> str:
    """Return an energy in the unit that fits.

    >>> joules_text(1234.0), joules_text(0.5)
    ('1.23 kJ', '0.5 J')
    """
    if joules is None or not math.isfinite(joules):
        return NOTHING
    size, unit = joules_unit(abs(joules))
    return f"{joules / size:.3g} {unit}"


def seconds_text(seconds: float | None) -> str:
    """Return a length of time in the one or two units that fit.

    >>> seconds_text(3.21), seconds_text(75), seconds_text(5400)
    ('3.2 s', '1 min 15 s', '1 h 30 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def number_text(value: float | None, digits: int = 4) -> str:
    """Return the number with `digits` significant digits, a whole number with thin groups, or a dash for none."""
    if value is None or not math.isfinite(value):
        return NOTHING
    if isinstance(value, int):
        return f"{value:,}".replace(",", "\u202f")
    if 10**digits <= abs(value) < 1e9:
        return number_text(round(value))
    return f"{value:#.{digits}g}".rstrip(".") if 1e-4 <= abs(value) < 1e9 else f"{value:.{digits}g}"
