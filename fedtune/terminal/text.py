"""How names, sizes and times are written on a terminal."""

from __future__ import annotations

import unicodedata

HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories that move the cursor, reorder text or cannot be seen."""


def printable(text: object, *, lines: bool = False) -> str:
    r"""Return the text with everything a terminal would obey written out as an escape.

    Clients choose their names and data their texts; neither may colour, overwrite or reverse what we print.

    Args:
        text: anything; `str` is taken of it.
        lines: keep line breaks.

    >>> printable("a" + chr(27) + "[2J")
    'a\\x1b[2J'
    """
    return "".join(
        character
        if unicodedata.category(character) not in HIDDEN or (lines and character == "\n")
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in str(text)
    )


def size(count: float) -> str:
    """Return bytes in decimal units, 1 MB = 10^6 bytes.

    >>> size(999), size(1_234_567)
    ('999 B', '1.2 MB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB", "GB"):
        count /= 1000
        if count < 999.95:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} TB"


def energy(joules: float) -> str:
    """Return an energy in J, kJ or MJ.

    >>> energy(0.25), energy(1234.0)
    ('0.25 J', '1.23 kJ')
    """
    for unit in ("J", "kJ"):
        if joules < 999.5:
            return f"{joules:.3g} {unit}"
        joules /= 1000
    return f"{joules:.3g} MJ"


def duration(seconds: float) -> str:
    """Return a time as `7.2 s`, then `m:ss`, then `h:mm:ss`.

    >>> duration(7.24), duration(62), duration(3723)
    ('7.2 s', '1:02', '1:02:03')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def number(value: float | None) -> str:
    """Return a metric with four significant digits; a dash for none.

    >>> number(2.41234), number(None), number(12)
    ('2.412', '-', '12')
    """
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:#.4g}".rstrip(".")
