"""The three protocols as the tables of a comparison's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from fedtune.report.protocols import Protocols, Resource
from fedtune.report.rendering import Table
from fedtune.report.spread import Spread
from fedtune.report.time_to_target import Ratio
from fedtune.report.units import NOTHING, bytes_text, joules_text, number_text, seconds_text

AMOUNT: Mapping[Resource, Callable[[float], str]] = {
    "bytes": bytes_text,
    "seconds": seconds_text,
    "joules": joules_text,
}


def protocol_tables(names: Sequence[str], content: Protocols) -> Mapping[str, Table]:
    """Return the tables of what is known, by caption."""
    measure = content.measure.replace("_", " ")
    tables = {}
    if content.under_budget:
        tables[f"Best {measure} on the {content.scored_on} within a budget per client"] = budget_table(names, content)
    if content.to_target:
        tables[f"Cost per client until the {measure} is {target_text(content.targets)}"] = target_table(names, content)
    tables["Robustness"] = robustness_table(names, content)
    return tables


def budget_table(names: Sequence[str], content: Protocols) -> Table:
    columns = [f"within {AMOUNT[part.resource](part.budget)}" for part in content.under_budget]
    rows = [
        [name, *(spread_text(part.quality[place], number_text, short) for part in content.under_budget)]
        for place, name in enumerate(names)
    ]
    return Table(["recipe", *columns], rows)


def target_table(names: Sequence[str], content: Protocols) -> Table:
    head, rows = ["recipe"], [[name] for name in names]
    for part in content.to_target:
        head += [part.resource, f"of {names[0]}"]
        show = AMOUNT[part.resource]
        for row, costs, mean, ratio in zip(rows, part.costs, part.mean, part.ratio, strict=True):
            reached = sum(cost is not None for cost in costs.values())
            missed = "never" if not reached else f"{reached} of {len(costs)} seeds"
            row += [missed if reached < len(costs) else spread_text(mean, show, show), ratio_text(ratio)]
    return Table(head, rows)


def robustness_table(names: Sequence[str], content: Protocols) -> Table:
    beside = any(row.calm for row in content.robustness)
    rows = []
    for name, row in zip(names, content.robustness, strict=True):
        lost, worst = spread_text(row.lost_updates, percent, percent), spread_text(row.worst_tenth, number_text, short)
        gain = f"{spread_text(row.gain_kept, percent, percent)} of {row.calm}" if row.calm else NOTHING
        rows.append([name, lost, worst, *([gain] if beside else [])])
    head = ["recipe", "updates lost", "loss of the worst tenth of clients", *(["gain kept"] if beside else [])]
    return Table(head, rows)


def target_text(targets: Mapping[int, float]) -> str:
    """Return the target, or the range of those of several seeds."""
    low, high = number_text(min(targets.values())), number_text(max(targets.values()))
    return low if low == high else f"{low} to {high}, by seed"


def spread_text(value: Spread, show: Callable[[float], str], show_deviation: Callable[[float], str]) -> str:
    if math.isnan(value.mean):
        return NOTHING
    return f"{show(value.mean)} ± {show_deviation(value.deviation)}" if value.deviation else show(value.mean)


def short(value: float) -> str:
    return number_text(value, 2)


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def ratio_text(ratio: Ratio) -> str:
    if math.isnan(ratio.mean):
        return NOTHING
    if math.isnan(ratio.low):
        return number_text(ratio.mean, 3)
    return f"{number_text(ratio.mean, 3)} ({number_text(ratio.low, 3)} to {number_text(ratio.high, 3)})"
