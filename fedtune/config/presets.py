"""Methods of the literature that are several tables of a recipe at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # FedSpine-style, after Yao et al., arXiv 2501.02438, of which no code and only the opening could be read.
    "fedspine": {"method": {"name": "flora"}, "pruning": {}, "planner": {"name": "bandit"}},
    # FedPipe-style, after Fang et al., arXiv 2404.06448, of which only the opening could be read; formulas are ours.
    "fedpipe": {"method": {"name": "flora"}, "planner": {"name": "fedpipe"}},
}
"""By the name in the table `method`: tables and the values that they start from."""


def expand_preset(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's tables with a preset in place of its name; the recipe's own values win.

    >>> expand_preset({"method": {"name": "fedspine"}, "planner": {"name": "s-ucb"}})["planner"]
    {'name': 's-ucb'}
    """
    method = table.get("method")
    name = method.get("name") if isinstance(method, Mapping) else None
    if not isinstance(name, str) or name not in PRESETS:
        return dict(table)
    expanded = dict(table)
    for part, values in PRESETS[name].items():
        own = table.get(part, {})
        if isinstance(own, Mapping):  # anything else is a fault, which binding reports
            expanded[part] = {**values, **own, **(values if part == "method" else {})}
    return expanded
