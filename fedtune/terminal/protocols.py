"""Quality under Budget, Cost to Target and Robustness as tables on a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from rich.table import Table
from rich.text import Text

from fedtune.terminal.summary import grid
from fedtune.terminal.text import duration, energy, number, printable, size

Json: TypeAlias = Mapping[str, Any]
AMOUNT: Mapping[str, Callable[[float], str]] = {"bytes": size, "seconds": duration, "joules": energy}
TIME: Mapping[str, str] = {"devices": "the devices' clock", "this machine": "this machine's clock"}


def protocol_tables(names: Sequence[str], content: Json) -> Iterator[Table]:
    """Yield a table for each protocol of which something is known."""
    measure = content["measure"].replace("_", " ")
    if content["under_budget"]:
        yield budget_table(names, content, measure)
    if content["to_target"]:
        yield target_table(names, content, measure)
    rows = content["robustness"]
    if any(row[key]["mean"] is not None for row in rows for key in ("lost_updates", "worst_tenth", "gain_kept")):
        yield robustness_table(names, rows)


def budget_table(names: Sequence[str], content: Json, measure: str) -> Table:
    parts = content["under_budget"]
    title = f"best {measure} on the {content['scored_on']} within a budget per client; time: {TIME[content['clock']]}"
    table = grid(title, "recipe", *(f"in {AMOUNT[part['resource']](part['budget'])}" for part in parts))
    for place, name in enumerate(names):
        table.add_row(Text(printable(name)), *(spread(part["quality"][place], number) for part in parts))
    return table


def target_table(names: Sequence[str], content: Json, measure: str) -> Table:
    parts, targets = content["to_target"], content["targets"].values()
    low, high = number(min(targets)), number(max(targets))
    until = low if low == high else f"{low} to {high}, by seed"
    table = grid(f"cost per client until the {measure} is {until}", "recipe", *(part["resource"] for part in parts))
    for place, name in enumerate(names):
        table.add_row(Text(printable(name)), *(cost(part, place) for part in parts))
    return table


def cost(part: Json, place: int) -> str:
    """Return what one recipe spent on the way to the target, or how many of its seeds got there."""
    costs = part["costs"][place].values()
    reached = sum(value is not None for value in costs)
    if not reached:
        return "never"
    if reached < len(costs):
        return f"{reached} of {len(costs)} seeds"
    return spread(part["mean"][place], AMOUNT[part["resource"]])


def robustness_table(names: Sequence[str], rows: Sequence[Json]) -> Table:
    gain = ["gain kept"] if any(row["calm"] for row in rows) else []
    table = grid("robustness", "recipe", "updates lost", "loss of worst tenth of clients", *gain)
    for name, row in zip(names, rows, strict=True):
        # In the column that is folded: names are long.
        beside = f"\nbeside {printable(row['calm'])}" if row["calm"] else ""
        table.add_row(
            Text(f"{printable(name)}{beside}"),
            spread(row["lost_updates"], percent),
            spread(row["worst_tenth"], number),
            *(spread(row["gain_kept"], percent) for _ in gain),
        )
    return table


def spread(value: Json, show: Callable[[float], str]) -> str:
    """Return a mean and, below it, its deviation."""
    if value["mean"] is None:
        return "-"
    return show(value["mean"]) + (f"\n± {show(value['deviation'])}" if value["deviation"] else "")


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"
