"""From a file, a text or tables to a `Recipe`: everything is checked, and all faults are raised together."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from fedtune.config.checks import check
from fedtune.config.error_text import display, join_words, nearest, quote
from fedtune.config.presets import PRESETS, expand_preset
from fedtune.config.reading import apply_overrides, read
from fedtune.config.recipe import SECTIONS, Recipe
from fedtune.config.rows import bind_devices, bind_overrides
from fedtune.config.tables import bind_table, bind_value, freeze_table, unknown_keys
from fedtune.errors import ConfigError, Fault
from fedtune.messages import ProbeSeeds
from fedtune.methods import METHODS
from fedtune.methods.flora import FloraSettings
from fedtune.model.settings import AdapterSettings
from fedtune.planning.adaptive import AdaptiveSettings
from fedtune.planning.fixed import FixedSettings
from fedtune.planning.policies import POLICIES

OPTIONAL = ("planner", "evaluate", "engine", "report", "override", "pruning", "fleet", "device")
"""Tables that a recipe may leave out."""
ABSENT = ("pruning", "fleet")
"""Tables without which something is not done; the others that are left out have their defaults."""

NAMED: Mapping[str, Mapping[str, type[Any]]] = {  # table -> settings by the table's key `name`
    "method": {name: method.settings for name, method in METHODS.items()} | dict.fromkeys(PRESETS, FloraSettings),
    "planner": {"fixed": FixedSettings, **dict.fromkeys(POLICIES, AdaptiveSettings)},
}

EXAMPLES: Mapping[str, str] = {
    "model": '{ base = "embedded" }',
    "adapter": '{ rank = 8, targets = ["all-linear"] }',
    "method": f'"{next(iter(METHODS))}"',
    "client": "{ steps = 20, batch = 4, learning_rate = 3e-4 }",
    "rounds": "{ count = 10 }",
    "data": '{ source = "train.jsonl", split = { kind = "iid", clients = 4 } }',
}
"""What a missing table might look like."""

EVERY_LAYER: Mapping[str, Any] = {"rank": 1, "targets": ["all-linear"]}
"""The table `adapter` for methods that train none: which layers there are, all of them."""


def bind(source: Path | str | Mapping[str, Any], *, overrides: Sequence[str] = ()) -> Recipe:
    """Read, check and freeze a recipe.

    Args:
        source: a file; a text, which is TOML if it has a line break and a file's path otherwise; or parsed tables.
        overrides: `table.key=value` as given to `--set`; values are TOML, bare words are text.

    Raises:
        ConfigError: with every fault at once, or the reason why the file cannot be read.
    """
    label, stem, root, table = read(source)
    faults: list[Fault] = []
    table = expand_preset(apply_overrides(table, overrides, faults))
    values = bind_sections(table, faults)
    values["root"] = root
    values["name"] = bind_name(table.get("name", stem), faults)
    values["seed"] = bind_value(Annotated[int, Ge(0)], table.get("seed", 0), "seed", faults)
    values["override"] = bind_overrides(table.get("override", ()), faults)
    values["device"] = bind_devices(table.get("device", ()), faults)
    recipe = freeze_table(Recipe, values, complete=not faults)
    faults.extend(check(recipe))
    if faults:
        raise ConfigError(faults, source=label)
    return with_absolute_paths(recipe, root)


def bind_sections(table: Mapping[str, Any], faults: list[Fault]) -> dict[str, Any]:
    """Bind every table but `override` and `device`; one that is missing and may not be is left out."""
    known = ("name", "seed", *SECTIONS, *NAMED, "override", "device")
    faults.extend(unknown_keys(table, known, ""))
    bound = dict[str, Any]()
    for name in (*SECTIONS, *NAMED):
        if name == "adapter" and name not in table and trains_no_adapter(table.get("method")):
            bound[name] = bind_table(AdapterSettings, EVERY_LAYER, name, faults)
        elif name not in table and name not in OPTIONAL:
            faults.append(Fault(name, f"the table [{name}]", "nothing", f"e.g. {name} = {EXAMPLES[name]}"))
        elif name not in table and name in ABSENT:
            bound[name] = None
        elif name in NAMED:
            bound |= bind_named(NAMED[name], table.get(name, {}), name, faults)
        else:
            bound[name] = bind_table(SECTIONS[name], table.get(name, {}), name, faults)
    return bound


def trains_no_adapter(method: Any) -> bool:
    """Return whether a table `method` names a method whose clients train no adapter."""
    name = method.get("name") if isinstance(method, dict) else method
    return isinstance(name, str) and name in METHODS and METHODS[name].task is ProbeSeeds


def bind_named(kinds: Mapping[str, type[Any]], content: Any, path: str, faults: list[Fault]) -> Mapping[str, Any]:
    """Bind a table whose key `name` says which settings it holds; return it by its name, or nothing at all."""
    if not isinstance(content, dict):
        faults.append(Fault(path, f"a table or a name ({join_words(kinds, joint='or')})", display(content)))
        return {}
    name = content.get("name", next(iter(kinds)) if path in OPTIONAL else None)
    if not isinstance(name, str) or name not in kinds:
        meant = nearest(name, kinds)
        got = "nothing" if name is None else display(name)
        hint = f"did you mean {quote(meant)}?" if meant else ""
        faults.append(Fault(f"{path}.name", join_words(map(quote, kinds), joint="or"), got, hint))
        return {}
    return {path: bind_table(kinds[name], content, path, faults)}


def bind_name(content: Any, faults: list[Fault]) -> str:
    if not isinstance(content, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", content):
        expected = "at most 100 letters, digits, dots, dashes and underscores, no dot or dash first (it names a folder)"
        faults.append(Fault("name", expected, display(content)))
    return str(content)


def with_absolute_paths(recipe: Recipe, root: Path) -> Recipe:
    """Return the recipe with the local files and folders that exist as absolute paths."""
    base, source, test = recipe.model.base, recipe.data.source, recipe.data.test
    return replace(
        recipe,
        model=recipe.model if base == "embedded" else replace(recipe.model, base=absolute(base, root)),
        data=replace(recipe.data, source=absolute(source, root), test=test if test is None else absolute(test, root)),
    )


def absolute(text: Any, root: Path) -> Any:
    """Return the absolute path of what exists, or pattern of what matches, below root; other text as it is."""
    if not isinstance(text, str):
        return tuple(absolute(part, root) for part in text)
    if not text or "\0" in text:
        return text
    path = os.path.normpath(root / os.path.expanduser(text))
    pattern = os.path.join(glob.escape(str(root)), os.path.expanduser(text))
    if os.path.exists(path):
        return path
    return pattern if glob.glob(pattern, recursive=True) else text
