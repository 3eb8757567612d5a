"""One page per table of recipe, site and server files: each key with its type, range, unit, default and docstring.

The facts are those of `fedtune.config.key_tables`; a new number needs its unit in `fedtune.config.units`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedtune.config.key_facts import REQUIRED, STEM, Key, Table

RECIPE_INTRODUCTIONS: Mapping[str, str] = {
    "method": """`method.name` chooses the method, and with it which keys the table has. `method = "flora"` is short for
`method = { name = "flora" }`. `method = "fedspine"` is a preset: `flora`, the table `pruning` and the planner
`deadline`; `method = "fedpipe"` is `flora` and the planner `fedpipe`. [Plug-ins](../plug-ins.md) bring further
names.""",
    "planner": """`planner.name` chooses the planner, which decides what each device is asked to do, and with it which
keys the table has. `planner = "deadline"` is short for `planner = { name = "deadline" }`. Without the table the planner
is `fixed`. [Plug-ins](../plug-ins.md) bring further names.""",
    "override": """Changes settings for some clients. Tables are applied in their order: where two name the same client
and key, the later one wins.""",
    "device": """Changes the simulated devices of some clients; it needs the table [`fleet`](fleet.md). Tables are
applied in their order.""",
    "pruning": "Without this table every client trains the whole model.",
    "fleet": "Without this table no devices are simulated.",
    "personal": """Without this table no client has a model of its own.
[Models of their own](../../how-to/personal.md) says how they are trained and scored.""",
    "search": """`fedtune search` reads this table, and all other commands ignore it: the recipe of every trial is this
recipe with other values. [Search for settings](../../how-to/search.md) shows how.""",
}
"""What a page says before its tables, by page."""


def settings_page(title: str, introduction: str, tables: Sequence[Table]) -> str:
    return "\n\n".join([f"# {title}", introduction, *(table_part(table) for table in tables)])


def table_part(table: Table) -> str:
    return "\n".join([f"## {table.title}\n\n{table.text}\n", *map(key_part, table.keys)])


def key_part(key: Key) -> str:
    default = key.default if key.default in (REQUIRED, STEM) else f"default `{key.default}`"
    facts = " · ".join(filter(None, [key.kind, key.range, key.unit, default]))
    return f"### `{key.name}`\n\n{facts}\n{{ .facts }}\n\n{key.text}\n"
