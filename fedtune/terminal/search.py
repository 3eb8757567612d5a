"""A search on a terminal of 80 columns: what it would run, a line for every step, and its result."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.terminal.summary import grid, table_width
from fedtune.terminal.text import duration, number, printable, size

Json: TypeAlias = Mapping[str, Any]
MOST_TRIALS = 20
"""Rows of the table; search.json has all."""


def show_search(console: Console, content: Json) -> None:
    """Print the content of search.json: the trials, what the search has spent, and how well early scores predict."""
    width = table_width(console)
    console.print(trials(content), width=width)
    if (more := len(content["trials"]) - MOST_TRIALS) > 0:
        console.print(Text(f"and {more} more trials, in search.json"), width=width)
    total = content["spent"]
    failed = f", {total['failed']} of them failed" if total["failed"] else ""
    console.print(
        Text(
            f"spent by the search: {total['trials']} trials{failed}, {total['client_rounds']} client-rounds, "
            f"{size(total['bytes_down'])} down, {size(total['bytes_up'])} up, {duration(total['seconds'])} here"
        ),
        width=width,
    )
    for row in content["rank_correlation"]:
        if row["value"] is not None:
            text = f"{row['value']:+.2f} with the final ones, over {row['trials']} trials"
            console.print(Text(f"ranks of the scores after round {row['rung']}: correlation {text}"), width=width)


def trials(content: Json) -> Table:
    """Return one row per trial, the best first."""
    title = f"{content['kind']}: held-out {content['metric']} of each trial after its last round"
    table = grid(title, "trial", "rounds", content["metric"], "client-rounds", "bytes", second="settings")
    for row in content["trials"][:MOST_TRIALS]:
        best = " *" if row["trial"] == content["best"] else ""
        state = f"\nfailed: {printable(row['reason'])[:160]}" if row["state"] == "failed" else ""
        table.add_row(
            Text(f"{row['trial']}{best}"),
            Text(f"{settings_lines(row['values'])}{state}"),
            str(row["rounds"]),
            number(row["score"]),
            str(row["client_rounds"]),
            size(row["bytes_down"] + row["bytes_up"]),
        )
    return table


def settings_lines(values: Mapping[str, Any]) -> str:
    """Return a line `learning_rate 0.001` for each setting of a trial."""
    names = [key.rpartition(".")[2] for key in values]
    return "\n".join(
        printable(f"{name if names.count(name) == 1 else key} {value}")
        for (key, value), name in zip(values.items(), names, strict=True)
    )


def show_plan(console: Console, content: Json) -> None:
    """Print what a search would run: each trial that can be known before it begins, and the rounds of all."""
    width = table_width(console)
    rungs = ", ".join(map(str, content["rungs"]))
    console.print(
        Text(
            f"{content['kind']}: {content['trials']} trials, compared after round {rungs}; "
            f"about {content['rounds']} rounds and {content['client_rounds']} client-rounds in all"
        ),
        width=width,
    )
    if not content["rows"]:
        return
    first, last = content["rungs"][0], content["rungs"][-1]
    columns = [f"bytes to round {rung}" for rung in dict.fromkeys((first, last))]
    table = grid(f"trials; bytes are {content['bytes_are']}", "trial", *columns, second="settings")
    for row in content["rows"][:MOST_TRIALS]:
        traffic = ["-" if row[key] is None else size(row[key]) for key in ("first_bytes", "bytes")[-len(columns) :]]
        table.add_row(Text(str(row["trial"])), Text(settings_lines(row["values"])), *traffic)
    console.print(table, width=width)
    if (more := len(content["rows"]) - MOST_TRIALS) > 0:
        console.print(Text(f"and {more} more trials; --json lists all"), width=width)
