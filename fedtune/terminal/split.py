"""Who holds which rows, as plain lines of at most 80 columns: sizes, rows of the largest labels, and distances."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedtune.terminal.bill import indented_lines, short

CLIENTS, COLUMNS, NAME = 24, 80, 24
"""Clients that are listed, columns of a line, and those of a client's name."""
LABEL = 15
"""Columns of a label, at most."""


def lines(split: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of a split, as `Planned.split` has it."""
    clients: Mapping[str, Mapping[str, Any]] = split["clients"]
    tested = any("test" in own for own in clients.values())
    mixed = "mix" in split
    total = sum(own["train"] + own["held_out"] for own in clients.values())
    yield f"Split {split['kind']}: {len(clients)} clients hold {total:,} rows; {split['left_out']:,} go to none"
    yield f"{'client':{NAME}}{'train':>9}{'held out':>10}" + f"{'test':>8}" * tested + f"{'distance':>10}" * mixed
    for name, own in list(clients.items())[:CLIENTS]:
        test = f"{own['test']:>8,}" if tested else ""
        distance = f"{split['mix']['distances'][name]:>10.3f}" if mixed else ""
        yield f"{short(name, NAME - 1):{NAME}}{own['train']:>9,}{own['held_out']:>10,}{test}{distance}"
    if len(clients) > CLIENTS:
        yield f"and {len(clients) - CLIENTS} clients more; --json lists every client"
    if mixed:
        yield ""
        yield from labels(split["mix"])


def labels(mix: Mapping[str, Any]) -> Iterator[str]:
    """Yield the rows of the largest labels by client, and how far the clients are from all rows together."""
    names: Sequence[str] = mix["labels"]
    totals = [sum(own[place] for own in mix["counts"].values()) for place in range(len(names))]
    largest = sorted(range(len(names)), key=lambda place: (-totals[place], place))
    width = max(6, min(LABEL, max(len(name) for name in names) + 1), max(len(f"{count:,}") for count in totals) + 1)
    room, others = (COLUMNS - NAME) // width, max(8, len(f"{sum(totals):,}") + 1)
    shown = largest if len(largest) <= room else largest[: (COLUMNS - NAME - others) // width]
    folded = len(shown) < len(largest)
    yield f"Rows of the labels in {mix['label']!r}" + f", the {len(shown)} largest of {len(names)}" * folded
    head = "".join(f"{short(names[place], width - 1):>{width}}" for place in shown)
    yield f"{'client':{NAME}}{head}" + f"{'others':>{others}}" * folded
    for name, own in [*list(mix["counts"].items())[:CLIENTS], ("all", totals)]:
        row = "".join(f"{own[place]:>{width},}" for place in shown)
        rest = f"{sum(own) - sum(own[place] for place in shown):>{others},}" if folded else ""
        yield f"{short(name, NAME - 1):{NAME}}{row}{rest}"
    text = f"mean total-variation distance of a client from all rows together: {mix['mean_distance']:.3f}"
    yield from indented_lines(text)
