"""The rows on which a client measures its loss before and after its training: the same for both, and in every round."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.data.encode import Example
from fedtune.seeds import derive, generator

SHARE = 0.03
"""Share of the training time that both measurements take together, where the training is long enough."""
STEP = 2.5
"""Forward passes that a step costs over a frozen base: measured between 2.3 and 2.8 on CPUs."""
FEWEST = 4
"""Rows that are measured where the training is short: the gain on fewer says little about the client."""
LARGEST = 1 / 6
"""Largest number of rows as a share of the examples that training sees: even the shortest measures in an eighth of
its time."""
MOST = 64
"""Rows beyond which a measurement is hardly more exact, and only takes time."""


def num_loss_rows(seen: int) -> int:
    """Return on how many rows the loss is measured where the local steps see so many examples.

    >>> [num_loss_rows(seen) for seen in (4, 12, 24, 800, 10_000)]
    [1, 2, 4, 30, 64]
    """
    within = int(SHARE * STEP * seen / 2)
    return max(1, min(max(FEWEST, within), int(LARGEST * seen), MOST))


def loss_rows(train: Sequence[Example], held_out: Sequence[Example], client: str, *, count: int) -> Sequence[Example]:
    """Return the rows for a client's losses: held-out ones where it holds out any, otherwise training rows.

    They depend on the client and the number of its rows alone, so that rounds, recipes and seeds are compared on the
    same rows, and fewer rows are a part of more.
    """
    rows = at_most(held_out or train, MOST, client)
    return at_most(rows, count, client)


def at_most(rows: Sequence[Example], count: int, client: str) -> Sequence[Example]:
    """Return all rows, or so many of them, drawn by the client's name."""
    if len(rows) <= count:
        return rows
    # Drawn, because the order of a file may be that of its classes.
    order = generator(derive(0, "loss.rows", client=client)).permutation(len(rows))
    return [rows[place] for place in order[:count].tolist()]
