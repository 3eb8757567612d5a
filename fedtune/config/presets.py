"""Methods and data sets of the literature, each of which is several keys of a recipe at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.data.presets import PRESETS as NAMED_DATA
from fedtune.data.presets import TEMPLATE, Preset

DATA_PRESETS: Mapping[str, Preset] = {str(name): preset for name, preset in NAMED_DATA.items()}
"""Data sets by the name in `data.preset`."""

PRESETS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    # FedSpine-style, after Yao et al., arXiv 2501.02438, of which no code and only the opening could be read.
    "fedspine": {"method": {"name": "flora"}, "pruning": {}, "planner": {"name": "bandit"}},
    # FedPipe-style, after Fang et al., arXiv 2404.06448, of which only the opening could be read; formulas are ours.
    "fedpipe": {"method": {"name": "flora"}, "planner": {"name": "fedpipe"}},
}
"""By the name in the table `method`: tables and the values that they start from."""


def expand_data_preset(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a recipe's tables with what `data.preset` says of the table `data`; the recipe's own values win.

    >>> expand_data_preset({"data": {"preset": "dolly", "source": "mine.jsonl"}})["data"]["template"]
    'alpaca'
    """
    data = table.get("data")
    name = data.get("preset") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(name, str) or name not in DATA_PRESETS:
        return dict(table)
    known = DATA_PRESETS[name]
    usual: dict[str, Any] = {"template": TEMPLATE}
    if "source" not in data:
        place = {"source": known.hub or known.file, "subset": known.subset, "revision": known.revision}
        usual |= {key: value for key, value in place.items() if value is not None}
    return {**table, "data": {**usual, **data}}


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
