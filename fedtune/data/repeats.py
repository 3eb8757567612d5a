"""Rows that stand both where a model is trained and where it is scored: counted, and reported."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import get_args

from fedtune.data.partition import Rows
from fedtune.data.settings import Part
from fedtune.data.table import Table


def fingerprints(rows: Table) -> Sequence[bytes]:
    """Return a digest of every row's texts; of its label and its group nothing is in it."""
    names = [part for part in get_args(Part) if part in rows.names and part not in ("label", "tools")]
    columns = [rows.column(name) for name in names]
    return [_digest(values) for values in zip(*columns, strict=True)]


def _digest(values: Sequence[str]) -> bytes:
    # Without empty parts: a file with a column of empty inputs holds the same rows as one without it.
    return hashlib.blake2b("\0".join(filter(None, values)).encode(), digest_size=16).digest()


def note_on_held_out(
    source: Sequence[bytes], trained: Mapping[str, Rows], held_out: Mapping[str, Sequence[bytes]]
) -> list[str]:
    """Return a note on the held-out rows of clients that equal a row that any client trains on.

    Args:
        source: fingerprints of the source.
        trained: by client, the rows of the source that it trains on.
        held_out: by client, fingerprints of the rows that it holds out.
    """
    learned = _training_set(source, trained)
    counts = {name: sum(row in learned for row in rows) for name, rows in held_out.items()}
    if not (total := sum(counts.values())):
        return []
    clients = [f"{name}: {count}" for name, count in sorted(counts.items(), key=lambda item: -item[1]) if count]
    more = ", ..." if len(clients) > 5 else ""
    return [
        f"data: {total} of {sum(map(len, held_out.values()))} held-out rows equal a row that is trained on "
        f"({', '.join(clients[:5])}{more}); their scores are better than those of new rows; remove repeated rows"
    ]


def note_on_test(source: Sequence[bytes], trained: Mapping[str, Rows], test: Sequence[bytes]) -> list[str]:
    """Return a note on the test rows that equal a row that any client trains on."""
    learned = _training_set(source, trained)
    if not (total := sum(row in learned for row in test)):
        return []
    return [
        f"data.test: {total} of {len(test)} rows equal a row that is trained on; their scores are better than those of "
        "new rows; remove repeated rows"
    ]


def _training_set(source: Sequence[bytes], trained: Mapping[str, Rows]) -> set[bytes]:
    return {source[row] for rows in trained.values() for row in rows.tolist()}
