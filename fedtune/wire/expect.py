"""One line per thing that is expected of bytes from outside, so that a message's checks read as a list."""

from __future__ import annotations

from fedtune.errors import WireError

LARGEST = 3.4028234663852886e38
"""Of float32: a larger number would be infinite where it is computed with."""
MAX_COUNT = 2**53
"""Of bytes, tokens and examples: float64 holds every whole number below it exactly."""
MAX_NUMBER = 2**31
"""Of settings that are whole numbers, such as steps."""
MAX_RANK = 2**16


def expect(holds: bool, expected: str, got: object, *, hint: str = "") -> None:
    """Return if a condition holds.

    >>> expect(len(b"ab") <= 2, "at most 2 bytes", 2)

    Raises:
        WireError: if not; it says what was expected, what came, and what to do.
    """
    if not holds:
        raise WireError(f"expected {expected}; got {got}{'; ' if hint else ''}{hint}")
