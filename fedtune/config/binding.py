"""From a file, a text or tables to a `Recipe`: everything is checked, and all faults are raised together."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from fedtune.config.checks import check
from fedtune.config.error_text import display, join_words, nearest, quote
from fedtune.config.plugins import find_method, find_planner, method_names, planner_names
from fedtune.config.presets import PRESETS, expand_data_preset, expand_preset
from fedtune.config.reading import apply_overrides, read
from fedtune.config.recipe import AT_SITES, PYTHON, PYTHON_PLANNER, SECTIONS, Objects, Recipe
from fedtune.config.rows import bind_devices, bind_overrides
from fedtune.config.search_table import bind_search
from fedtune.config.tables import AT_FAULT, bind_table, bind_value, freeze_table, unknown_keys
from fedtune.data.given import Given, given_rows
from fedtune.data.settings import GROUP
from fedtune.errors import ConfigError, Fault
from fedtune.messages import ProbeSeeds
from fedtune.methods import METHODS
from fedtune.methods.method import Method
from fedtune.methods.settings import LinearSettings
from fedtune.planning.planner import PlannerType

OPTIONAL = (
    *("adapter", "method", "client", "rounds", "planner", "evaluate", "engine", "report"),
    *("descend", "override", "pruning", "personal", "asynchronous", "fleet", "device", "search"),
)
"""Tables that a recipe may leave out."""
ABSENT = ("pruning", "personal", "asynchronous", "fleet", "descend", "search")
"""Tables without which something is not done; the others that are left out have their defaults."""

NAMED = ("method", "planner")
"""Tables whose key `name` says which settings they hold."""

EXAMPLES: Mapping[str, str] = {"model": '{ base = "embedded" }', "data": '{ source = "train.jsonl" }'}
"""What a missing table might look like."""

STEPS = 10
"""Of a client in a round, where a recipe gives neither steps nor epochs."""
CLIENTS = 4
"""Equal random parts of the rows of one file, where a recipe does not say who holds which."""

DATA_AT_SITES = (f"data.source={AT_SITES!r}", 'data.split={ kind = "files" }')
"""Of a recipe for sites, whose data are not here."""

EVERY_LAYER: Mapping[str, Any] = {"rank": 1, "targets": ["all-linear"]}
"""The table `adapter` for methods that train none: which layers there are, all of them."""


def bind(
    source: Path | str | Mapping[str, Any], *, overrides: Sequence[str] = (), objects: Objects | None = None
) -> Recipe:
    """Read, check and freeze a recipe.

    Args:
        source: a file; a text, which is TOML if it has a line break and a file's path otherwise; or parsed tables.
        overrides: `table.key=value` as given to `--set`; values are TOML, bare words are text.
        objects: Python objects in place of the names of method, planner, model or data.

    Raises:
        ConfigError: with every fault at once, or the reason why the file cannot be read.
    """
    faults: list[Fault] = []
    label, recipe = bind_types(source, overrides, objects or Objects(), faults)
    faults.extend(check(recipe))
    if faults:
        raise ConfigError(faults, source=label)
    return with_absolute_paths(recipe, recipe.root)


def bind_types(
    source: Path | str | Mapping[str, Any], overrides: Sequence[str], objects: Objects, faults: list[Fault]
) -> tuple[str, Recipe]:
    """Return a recipe's name for messages, and the recipe, of whose values each is what its key takes by itself.

    What they must be together is not checked; faults are noted.
    """
    label, stem, root, table = read(source)
    table = expand_data_preset(expand_preset(with_objects(apply_overrides(table, overrides, faults), objects)))
    values = bind_sections(with_defaults(table, root, objects), objects, faults)
    values |= {"root": root, "objects": objects, "name": bind_name(table.get("name", stem), faults)}
    values["seed"] = bind_value(Annotated[int, Ge(0)], table.get("seed", 0), "seed", faults)
    values["override"] = bind_overrides(table.get("override", ()), faults)
    values["device"] = bind_devices(table.get("device", ()), faults)
    return label, freeze_table(Recipe, values, complete=not faults)


def bind_for_sites(source: Path | str | Mapping[str, Any], *, overrides: Sequence[str] = ()) -> Recipe:
    """Return a recipe whose data may stay at the sites: its table `data` needs no source.

    Raises:
        ConfigError: as `bind`.
    """
    *_, tables = read(source)
    data = tables.get("data", {})
    at_sites = DATA_AT_SITES if isinstance(data, Mapping) and "source" not in data else ()
    return bind(source, overrides=(*at_sites, *overrides))


def bind_sections(table: Mapping[str, Any], objects: Objects, faults: list[Fault]) -> dict[str, Any]:
    """Bind every table but `override` and `device`; one that is missing and may not be is left out."""
    known = ("name", "seed", *SECTIONS, *NAMED, "override", "device")
    faults.extend(unknown_keys(table, known, ""))
    bound = dict[str, Any]()
    table = with_every_layer(table, objects)
    for name in (*SECTIONS, *NAMED):
        if name not in table and name not in OPTIONAL:
            faults.append(Fault(name, f"the table [{name}]", "nothing", f"e.g. {name} = {EXAMPLES[name]}"))
        elif name not in table and name in ABSENT:
            bound[name] = None
        elif name == "search":
            bound[name] = bind_search(table["search"], faults)
        elif name in NAMED:
            bound[name] = bind_named(name, table.get(name, {}), objects, faults)
        else:
            bound[name] = bind_table(SECTIONS[name], table.get(name, {}), name, faults)
    return bound


def with_objects(table: Mapping[str, Any], objects: Objects) -> Mapping[str, Any]:
    """Return a recipe's tables with the names that Python objects have in its text."""
    tables = dict(table)
    for name, value, values in (
        ("method", objects.method, {"name": objects.method.name} if objects.method else {}),
        ("model", objects.model, {"base": PYTHON}),
        ("data", objects.data, {} if objects.data is None else data_names(given_rows(objects.data), tables)),
    ):
        own = tables.get(name, {})
        if value is not None and isinstance(own, Mapping):  # else `bind_table` finds the fault
            tables[name] = {**values, **own} if name == "method" else {**own, **values}
    data = tables.get("data")
    if isinstance(data, Mapping) and data.get("format") == "plugin":
        tables["data"] = {"split": {"kind": "key", "by": GROUP}, **data}
    if objects.trainer is not None and isinstance(tables.get("client", {}), Mapping):
        tables["client"] = {**tables.get("client", {}), "trainer": PYTHON}
    if objects.planner is not None:
        tables["planner"] = {"name": PYTHON, "type": type_name(objects.planner)}
    return tables


def data_names(given: Given, table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the keys of the table `data` that rows of Python stand in for; test rows that the recipe names stay."""
    if given.whole is None:
        return {"source": PYTHON, "split": {"kind": "key", "by": GROUP}}
    own = table.get("data")
    named = isinstance(own, Mapping) and "test" in own
    return {"source": PYTHON} | ({} if given.test is None or named else {"test": PYTHON})


def type_name(planner: Any) -> str:
    """Return module and name of a planner's class, or of the function or the class that creates it."""
    kind = planner if callable(planner) else type(planner)
    return f"{kind.__module__}.{kind.__qualname__}"


def with_every_layer(table: Mapping[str, Any], objects: Objects) -> Mapping[str, Any]:
    """Return the tables with one for `adapter` that takes every layer, where the method trains no adapter."""
    return {**table, "adapter": EVERY_LAYER} if "adapter" not in table and measures_seeds(table, objects) else table


def measures_seeds(table: Mapping[str, Any], objects: Objects) -> bool:
    """Return whether the method of a recipe's tables is one whose clients measure seeds; false where it has a fault."""
    content = table.get("method")
    if not isinstance(content, dict) or not isinstance(content.get("name"), str):
        return False
    try:
        method = objects.method or find_method(content["name"])
    except ConfigError:
        return False  # binding the table `method` finds the same fault
    return method.task is ProbeSeeds


def with_defaults(table: Mapping[str, Any], root: Path, objects: Objects) -> Mapping[str, Any]:
    """Return the tables with the keys whose default depends on others.

    They are a client's steps and, where it measures seeds, its learning rate; and who holds which rows.

    Several files are one client each; the rows of one source are dealt out to a few clients. Where some clients
    descend, how is written out; where all do, none has steps of probing.
    """
    tables, client, data = dict(table), table.get("client", {}), table.get("data")
    seeds = measures_seeds(table, objects)
    # Another method's table has no such key: its own fault says so.
    verbs = verbs_in(table) if seeds else set[str]()
    if {"descend", "auto"} & verbs:
        tables.setdefault("descend", {})
    if isinstance(client, Mapping) and not {"steps", "epochs"} & client.keys() and verbs != {"descend"}:
        tables["client"] = client = {**client, "steps": STEPS}
    if isinstance(client, Mapping) and "learning_rate" not in client and seeds and verbs != {"descend"}:
        tables["client"] = {**client, "learning_rate": "auto"}
    if isinstance(data, Mapping) and "split" not in data:
        several = count_files(data.get("source"), root) > 1
        tables["data"] = {**data, "split": {"kind": "files"} if several else {"kind": "iid", "clients": CLIENTS}}
    return tables


def verbs_in(table: Mapping[str, Any]) -> set[str]:
    """Return what the tables of a recipe let clients do, before they are bound; see `recipe.requested_verbs`."""
    method, rows = table.get("method"), table.get("override")
    usual = method.get("verb") if isinstance(method, Mapping) else None
    verbs = {usual if isinstance(usual, str) else "probe"}
    for row in rows if isinstance(rows, list | tuple) else ():
        if isinstance(row, Mapping) and isinstance(verb := row.get("verb"), str):
            globs = row.get("clients")
            every = globs == "*" or (isinstance(globs, list | tuple) and "*" in globs)
            verbs = {verb} if every else verbs | {verb}
    return verbs


def count_files(source: Any, root: Path) -> int:
    """Return how many files a source names, by itself or by globs; 0 for what is none."""
    if isinstance(source, list | tuple):
        return sum(count_files(part, root) for part in source)
    path = absolute(source, root) if isinstance(source, str) else ""
    return len(glob.glob(path, recursive=True)) if path and not os.path.exists(path) else int(bool(path))


def bind_named(table: str, content: Any, objects: Objects, faults: list[Fault]) -> Any:
    """Bind a table whose key `name` says which settings it holds; `AT_FAULT` if that cannot be known."""
    names = names_in(table, objects)
    if not isinstance(content, dict):
        faults.append(Fault(table, f"a table or a name ({join_words(names, joint='or')})", display(content)))
        return AT_FAULT
    name = content.get("name", names[0] if table in OPTIONAL else None)
    if not isinstance(name, str) or name not in (*names, PYTHON):
        meant = nearest(name, names)
        got = "nothing" if name is None else display(name)
        own = f"install the package that brings it; in Python, pass your own: fedtune.simulate(..., {table}=...)"
        hint = f"did you mean {quote(meant)}?" if meant else own
        faults.append(Fault(f"{table}.name", join_words(map(quote, names), joint="or"), got, hint))
        return AT_FAULT
    try:
        kind = type_named(table, name, objects)
    except ConfigError as error:
        faults.extend(error.faults)
        return AT_FAULT
    if isinstance(kind, Method) and not issubclass(kind.settings, LinearSettings):
        keys = {field.name for field in fields(kind.settings)}
        for key in sorted(content.keys() & {"server_optimizer", "robust"} - keys):
            faults.append(not_linear(key, name, kind))
            content = {other: value for other, value in content.items() if other != key}
    return bind_table(kind.settings, content, table, faults)


def names_in(table: str, objects: Objects) -> Sequence[str]:
    """Return what may be written in `method.name` or `planner.name`."""
    if table == "planner":
        return planner_names()
    own = [objects.method.name] if objects.method else []
    return [*dict.fromkeys((*own, *method_names(), *PRESETS))]


def type_named(table: str, name: str, objects: Objects) -> Method[Any] | PlannerType:
    """Return the method, or the kind of planner, of a name.

    Raises:
        ConfigError: if it cannot be used.
    """
    if table == "planner":
        return PYTHON_PLANNER if name == PYTHON else find_planner(name)
    if objects.method is None:
        return find_method(name)
    if name != objects.method.name:
        expected = f"{quote(objects.method.name)}, the name of the method that was passed as an object"
        raise ConfigError(Fault("method.name", expected, quote(name), "change the name, or pass no method"))
    return objects.method


def not_linear(key: str, name: str, method: Method[Any]) -> Fault:
    """Return the fault of a key that only methods have which use nothing of the updates but a mean."""
    linear = [name for name, other in METHODS.items() if issubclass(other.settings, LinearSettings)]
    expected = f"a method whose server takes one step towards a mean ({join_words(linear, joint='or')})"
    got = f"{quote(name)}: {method.why_not_linear}" if method.why_not_linear else quote(name)
    return Fault(f"method.{key}", expected, got, "leave it out, or change the method")


def bind_name(content: Any, faults: list[Fault]) -> str:
    if not isinstance(content, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", content):
        expected = "at most 100 letters, digits, dots, dashes and underscores, no dot or dash first (it names a folder)"
        faults.append(Fault("name", expected, display(content)))
    return str(content)


def with_absolute_paths(recipe: Recipe, root: Path) -> Recipe:
    """Return the recipe with the local files and folders that exist as absolute paths."""
    base, source, test = recipe.model.base, recipe.data.source, recipe.data.test
    start, split = recipe.adapter.start, recipe.data.split
    if split.file is not None:
        split = replace(split, file=absolute(split.file, root))
    return replace(
        recipe,
        adapter=recipe.adapter if start is None else replace(recipe.adapter, start=absolute(start, root)),
        model=recipe.model if base == "embedded" else replace(recipe.model, base=absolute(base, root)),
        data=replace(
            recipe.data,
            source=absolute(source, root),
            test=test if test is None else absolute(test, root),
            split=split,
        ),
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
