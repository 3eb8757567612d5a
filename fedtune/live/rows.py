"""One round and one client as the live page has them: few numbers, each one that JSON can hold, and visible texts."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping
from typing import Any

from fedtune.rounds.record import ClientRecord, RoundRecord

MOST_CHARACTERS = 300
"""Of a text that a client wrote."""
HIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
"""Unicode categories that reorder a text, break its line or cannot be seen."""


def round_row(record: RoundRecord) -> dict[str, Any]:
    """Return the numbers of a round."""
    test = record.test or {}
    return {
        "n": record.round,
        "before": finite(record.loss_before),
        "after": finite(record.loss_after),
        "test": finite(test.get("loss")),
        "accuracy": finite(test.get("accuracy")),
        "up": record.bytes_up,
        "down": record.bytes_down,
        "used": record.used,
        "asked": len(record.clients),
        "seconds": finite(record.seconds),
    }


def client_after(row: Mapping[str, Any], round: int, client: ClientRecord) -> dict[str, Any]:
    """Return a client's row after one more round."""
    used = client.status == "ok"
    return {
        "state": "used" if used else client.status,
        "round": round,
        "before": finite(client.loss_before) if used else row["before"],
        "after": finite(client.loss_after) if used else row["after"],
        "up": row["up"] + client.bytes_up,
        "down": row["down"] + client.bytes_down,
        "used": row["used"] + used,
        "problem": "" if used else visible(client.reason),
    }


def finite(value: float | None) -> float | None:
    """Return a number that JSON can hold, or None."""
    return value if value is not None and math.isfinite(value) else None


def visible(text: str) -> str:
    r"""Return a text in one line, cut, with all that would reorder or hide a part of it written out as an escape.

    >>> visible("a" + chr(0x202E) + "b")
    'a\\u202eb'
    """
    cut = text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]}..."
    return "".join(
        character
        if unicodedata.category(character) not in HIDDEN
        else character.encode("unicode_escape", "surrogatepass").decode()
        for character in cut
    )
