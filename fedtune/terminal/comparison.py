"""A comparison of recipes as tables on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedtune.terminal.protocols import protocol_tables, spread
from fedtune.terminal.summary import grid, table_width
from fedtune.terminal.text import duration, number, printable, size

Json: TypeAlias = Mapping[str, Any]


def show_comparison(console: Console, content: Json) -> None:
    """Print the content of comparison.json: results, differences, the three protocols, settings and warnings."""
    width = table_width(console)
    console.print(results(content["recipes"]), width=width)
    if content["differences"]:
        console.print(difference_table(content["differences"], content["recipes"][0]["name"]), width=width)
    for table in protocol_tables([row["name"] for row in content["recipes"]], content["protocols"]):
        console.print(table, width=width)
    if content["settings"]:
        console.print(settings(content["settings"], [row["name"] for row in content["recipes"]]), width=width)
    for text in content["warnings"]:
        console.print(Text(f"warning: {printable(text)}", style="yellow"))


def results(rows: Sequence[Json]) -> Table:
    """Return one row per recipe: mean over its seeds, with the sample standard deviation where there are several."""
    table = grid(
        "mean over seeds, ± sample standard deviation", "recipe", "base", "test loss", "mean client", "bytes", "time"
    )
    for row in rows:
        seeds = ", ".join(map(str, row["seeds"]))
        state = "" if row["finished"] else "; interrupted"
        table.add_row(
            Text(f"{printable(row['name'])}\n{row['method']}, seed {seeds}{state}"),
            spread(row["test_before"], number),
            spread(row["test_after"], number),
            spread(row["mean_client"], number),
            spread(row["bytes"], size),
            spread(row["seconds"], duration),
        )
    return table


def difference_table(rows: Sequence[Json], first: str) -> Table:
    """Return one row per recipe: how far its loss is above the first one's."""
    title = f"loss above that of {first} (below zero is better), 95 % interval by Student's t"
    table = grid(title, "recipe", "difference", "95 % interval", "pairs", second="of the")
    for row in rows:
        span = row["interval"]
        known = span["low"] is not None
        table.add_row(
            Text(printable(row["recipe"])),
            row["measure"],
            f"{span['mean']:+.4f}",
            f"{span['low']:+.4f} to {span['high']:+.4f}" if known else "needs two pairs",
            f"{span['pairs']} {row['paired_by']}{'' if span['pairs'] == 1 else 's'}",
        )
    return table


def settings(rows: Mapping[str, Sequence[str]], names: Sequence[str]) -> Table:
    """Return the settings that are not the same in all recipes, a row for each."""
    table = Table.grid(padding=(0, 2, 0, 1))
    table.title, table.title_justify = Text("settings that differ"), "left"
    for _ in range(3):
        table.add_column(overflow="fold")
    for key, values in rows.items():
        for place, (name, value) in enumerate(zip(names, values, strict=True)):
            table.add_row(Text("" if place else printable(key)), Text(printable(name)), Text(printable(value)))
    return table
