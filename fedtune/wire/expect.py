"""One line per thing that is expected of bytes from outside, so that a message's checks read as a list."""

from __future__ import annotations

from fedtune.errors import WireError


def expect(holds: bool, expected: str, got: object, *, hint: str = "") -> None:
    """Return if a condition holds.

    >>> expect(len(b"ab") <= 2, "at most 2 bytes", 2)

    Raises:
        WireError: if not; it says what was expected, what came, and what to do.
    """
    if not holds:
        raise WireError(f"expected {expected}; got {got}{'; ' if hint else ''}{hint}")
