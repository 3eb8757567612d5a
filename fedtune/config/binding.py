"""From tables to a `Recipe`: every value checked against its settings' types, all faults found before one is raised."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from annotated_types import Ge
from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedtune.config.checks import check, steps_or_epochs
from fedtune.config.error_text import allows, choices, describe, display, join_words, nearest, quote
from fedtune.config.plugins import find_method, find_planner, method_names, planner_names
from fedtune.config.presets import PRESETS, expand_preset
from fedtune.config.reading import apply_overrides, read, value_of
from fedtune.config.recipe import PYTHON, PYTHON_PLANNER, Objects, Override, Recipe, ReportSettings
from fedtune.data.settings import GROUP, DataSettings
from fedtune.devices.profiles import PROFILES, DeviceProfile
from fedtune.devices.profiles import check as check_profile
from fedtune.errors import ConfigError, Fault
from fedtune.messages import ProbeSeeds, Training, Verb
from fedtune.methods import METHODS
from fedtune.methods.method import Method
from fedtune.methods.settings import LinearSettings
from fedtune.model.settings import AdapterSettings, EvaluationSettings, ModelSettings
from fedtune.planning.fixed import FixedSettings
from fedtune.planning.planner import PlannerType
from fedtune.pruning.ranking import PruningSettings
from fedtune.rounds.schedule import Schedule
from fedtune.simulation.resources import Resources
from fedtune.simulation.settings import DeviceOverride, EngineSettings, FleetSettings

SECTIONS: Mapping[str, type[Any]] = {
    "model": ModelSettings,
    "adapter": AdapterSettings,
    "client": Training,
    "rounds": Schedule,
    "data": DataSettings,
    "evaluate": EvaluationSettings,
    "pruning": PruningSettings,
    "fleet": FleetSettings,
    "engine": EngineSettings,
    "report": ReportSettings,
}
OPTIONAL = ("planner", "evaluate", "engine", "report", "override", "pruning", "fleet", "device")
"""Tables that a recipe may leave out."""
ABSENT = ("pruning", "fleet")
"""Tables that stand for nothing where they are left out."""

NAMED = ("method", "planner")
"""Tables whose key `name` says which settings they hold."""

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

DECLARED = [each.name for each in fields(DeviceProfile) if each.name not in ("name", "provenance")]
"""Fields of a device's profile that a table `device` may change."""

STRICT = ConfigDict(strict=True, allow_inf_nan=False)


@dataclass
class Findings:
    """What binding has gathered so far."""

    faults: list[Fault] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    """Good values by dotted key."""


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
    label, stem, root, table = read(source)
    found, objects = Findings(), objects or Objects()
    table = expand_preset(with_objects(apply_overrides(table, overrides, found.faults), objects))
    bound = sections(table, found, objects)
    bound["name"] = bind_name(table.get("name", stem), found)
    bound["seed"] = leaf(Annotated[int, Ge(0)], table.get("seed", 0), "seed", found)
    bound["override"] = bind_overrides(table.get("override", ()), found)
    bound["device"] = bind_devices(table.get("device", ()), found)
    found.faults.extend(check(found.values))
    found.faults.extend(unreachable_objects(objects, found.values.get("engine.name")))
    if found.faults:
        raise ConfigError(found.faults, source=label)
    return with_absolute_paths(Recipe(root=root, objects=objects, **bound), root)


def sections(table: Mapping[str, Any], found: Findings, objects: Objects) -> dict[str, Any]:
    """Bind every table but `override`; a table that has a fault is bound to None."""
    known = ("name", "seed", *SECTIONS, *NAMED, "override", "device")
    found.faults.extend(unknown_keys(table, known, ""))
    bound: dict[str, Any] = {}
    table = with_every_layer(table, objects)
    for name in (*SECTIONS, *NAMED):
        if name not in table and name not in OPTIONAL:
            found.faults.append(Fault(name, f"the table [{name}]", "nothing", f"e.g. {name} = {EXAMPLES[name]}"))
            continue
        if name not in table and name in ABSENT:
            bound[name] = found.values[name] = None
            continue
        content = table.get(name, {})
        if name in NAMED:
            bound[name] = bind_named(name, content, found, objects)
            if bound[name] is not None:
                found.values[name] = bound[name]
        else:
            bound[name] = bind_table(SECTIONS[name], content, name, found)
            if bound[name] is not None and name in ABSENT:
                found.values[name] = bound[name]
    return bound


def with_objects(table: Mapping[str, Any], objects: Objects) -> Mapping[str, Any]:
    """Return a recipe's tables with the names that Python objects have in its text."""
    tables = dict(table)
    for name, given, values in (
        ("method", objects.method, {"name": objects.method.name} if objects.method else {}),
        ("model", objects.model, {"base": PYTHON}),
        ("data", objects.data, {"source": PYTHON, "split": {"kind": "key", "by": GROUP}}),
    ):
        own = tables.get(name, {})
        if given is not None and isinstance(own, Mapping):  # else `bind_table` finds the fault
            tables[name] = {**values, **own} if name == "method" else {**own, **values}
    data = tables.get("data")
    if isinstance(data, Mapping) and data.get("format") == "plugin":
        tables["data"] = {"split": {"kind": "key", "by": GROUP}, **data}
    if objects.planner is not None:
        tables["planner"] = {"name": PYTHON, "type": type_name(objects.planner)}
    return tables


def unreachable_objects(objects: Objects, engine: str | None) -> Iterator[Fault]:
    """Yield the objects that an engine's worker processes would need and cannot be given."""
    given = [name for name, value in vars(objects).items() if value is not None]
    alone = {"processes": [name for name in given if name == "model"], "ray": given}.get(engine or "", [])
    if alone:
        got = f"{quote(engine)} with {join_words(f'{name}=' for name in alone)}"
        hint = "worker processes load by name what a Python object gives to this process alone"
        yield Fault("engine.name", '"inprocess" with Python objects', got, hint)


def type_name(planner: Any) -> str:
    """Return module and name of a planner's class, or of the function or the class that creates it."""
    kind = planner if callable(planner) else type(planner)
    return f"{kind.__module__}.{kind.__qualname__}"


def with_every_layer(table: Mapping[str, Any], objects: Objects) -> Mapping[str, Any]:
    """Return the tables with one for `adapter` that takes every layer, where the method trains no adapter."""
    content = table.get("method")
    if "adapter" in table or not isinstance(content, dict) or not isinstance(content.get("name"), str):
        return table
    try:
        method = objects.method or find_method(content["name"])
    except ConfigError:
        return table  # binding the table `method` finds the same fault
    return {**table, "adapter": EVERY_LAYER} if method.task is ProbeSeeds else table


def bind_named(table: str, content: Any, found: Findings, objects: Objects) -> Any:
    """Bind a table whose key `name` says which settings it holds, and note the type that has this name."""
    names = names_in(table, objects)
    if not isinstance(content, dict):
        found.faults.append(Fault(table, f"a table or a name ({join_words(names, joint='or')})", display(content)))
        return None
    name = content.get("name", names[0] if table in OPTIONAL else None)
    if not isinstance(name, str) or name not in (*names, PYTHON):
        meant = nearest(name, names)
        got = "nothing" if name is None else display(name)
        hint = f"did you mean {quote(meant)}?" if meant else f"or pass {table}=, or install the package that brings it"
        found.faults.append(Fault(f"{table}.name", join_words(map(quote, names), joint="or"), got, hint))
        return None
    try:
        kind = type_named(table, name, objects)
    except ConfigError as error:
        found.faults.extend(error.faults)
        return None
    found.values[f"{table}:type"] = kind  # with a colon, so that no key of the table has this name
    if table == "method" and "server_optimizer" in content and not takes_optimizer(kind.settings):
        linear = [name for name, method in METHODS.items() if takes_optimizer(method.settings)]
        expected = f"a method whose server takes one step towards a mean ({join_words(linear, joint='or')})"
        found.faults.append(
            Fault("method.server_optimizer", expected, quote(name), "leave it out, or change the method")
        )
        content = {key: value for key, value in content.items() if key != "server_optimizer"}
    return bind_table(kind.settings, content, table, found)


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


def takes_optimizer(settings: type[Any]) -> bool:
    return issubclass(settings, LinearSettings)


def bind_table(cls: type[Any], content: Any, path: str, found: Findings) -> Any:
    """Return the settings that a table holds, or None after noting its faults."""
    if not isinstance(content, dict):
        found.faults.append(Fault(path, "a table", display(content)))
        return None
    before = len(found.faults)
    found.faults.extend(unknown_keys(content, [f.name for f in fields(cls)], path))
    hints = get_type_hints(cls, include_extras=True)
    values = {}
    for each in fields(cls):
        key = f"{path}.{each.name}"
        if each.name in content:
            values[each.name] = leaf(hints[each.name], content[each.name], key, found)
        elif each.default is not MISSING:
            values[each.name] = found.values[key] = each.default
        elif each.default_factory is not MISSING:
            values[each.name] = found.values[key] = each.default_factory()
        else:
            found.faults.append(Fault(key, describe(hints[each.name]), "nothing"))
    return None if len(found.faults) > before else cls(**values)


def leaf(annotation: Any, content: Any, path: str, found: Findings) -> Any:
    """Return one value as its type asks, or None after noting the fault."""
    if is_dataclass(annotation) and isinstance(annotation, type):
        table = bind_table(annotation, content, path, found)
        if table is not None:
            found.values[path] = table
        return table
    if get_origin(annotation) is Mapping and isinstance(content, dict):
        parts, kind = get_args(annotation)
        return bind_mapping(get_args(parts), kind, content, path, found)
    if content == "none" and allows(annotation, type(None)) and not allows(annotation, str):
        content = None
    try:
        value = TypeAdapter(annotation, config=STRICT).validate_python(freeze(content))
    except ValidationError:
        found.faults.append(misfit(annotation, content, path))
        return None
    found.values[path] = value
    return value


def bind_mapping(known: Collection[str], kind: Any, content: Mapping[str, Any], path: str, found: Findings) -> Any:
    """Return a table of known keys whose values are all of one kind, or None after noting its faults."""
    before = len(found.faults)
    found.faults.extend(unknown_keys(content, known, path))
    values = {key: leaf(kind, value, f"{path}.{key}", found) for key, value in content.items() if key in known}
    if len(found.faults) > before:
        return None
    found.values[path] = values
    return values


def misfit(annotation: Any, content: Any, path: str) -> Fault:
    """Say that a value is not what its type allows, and which allowed one is near."""
    meant = nearest(content, choices(annotation))
    hint = f"did you mean {quote(meant)}?" if meant else ""
    if isinstance(content, str) and not hint:
        bare = value_of(f"0{content}" if content.startswith(".") else content)  # TOML has no numbers such as .5
        hint = f"write {display(bare)} without quotes" if not isinstance(bare, str) and fits(annotation, bare) else ""
    got = display(content)
    if get_origin(annotation) is Sequence and isinstance(content, list | tuple):
        bad = [display(item) for item in content if not fits(get_args(annotation)[0], item)]
        got = f"{join_words(bad[:3])} in {got}" if bad and len(content) > 1 else got
    return Fault(path, describe(annotation), got, hint)


def fits(annotation: Any, content: Any) -> bool:
    trial = Findings()
    leaf(annotation, content, "", trial)
    return not trial.faults


def unknown_keys(content: Mapping[str, Any], known: Collection[str], path: str) -> Iterator[Fault]:
    """Yield a fault for each key that is not known, with the nearest that is."""
    for key in content:
        if key in known:
            continue
        where = f"{path}.{key}" if path else str(key)
        meant = nearest(key, known)
        elsewhere = [home for home in all_keys() if home.rpartition(".")[2] == key]
        if meant:
            hint = f"did you mean {meant}?"
        elif elsewhere:
            hint = f"it belongs in {join_words(elsewhere, joint='or')}"
        else:
            hint = f"the keys are {join_words(known)}"
        yield Fault(where, "a known key", "an unknown one", hint)


def all_keys() -> Sequence[str]:
    tables = [*SECTIONS.items(), ("data.split", get_type_hints(DataSettings)["split"])]
    return [f"{table}.{each.name}" for table, cls in tables for each in fields(cls)]


def bind_name(content: Any, found: Findings) -> str:
    if not isinstance(content, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", content):
        expected = "at most 100 letters, digits, dots, dashes and underscores, no dot or dash first (it names a folder)"
        found.faults.append(Fault("name", expected, display(content)))
    return str(content)


def bind_overrides(content: Any, found: Findings) -> tuple[Override, ...]:
    """Bind the tables `override`, each to the keys of `client`, the rank and the resources that it changes."""
    if not isinstance(content, list | tuple):
        found.faults.append(Fault("override", "a list of tables, each [[override]]", display(content)))
        return ()
    before = len(found.faults)
    bound = [bind_override(row, f"override.{place}", found) for place, row in enumerate(content)]
    overrides = tuple(override for override in bound if override is not None)
    if len(found.faults) == before:
        found.values["override"] = overrides
    return overrides


def bind_override(row: Any, path: str, found: Findings) -> Override | None:
    if not isinstance(row, dict):
        found.faults.append(Fault(path, "a table", display(row)))
        return None
    hints = {"clients": str | Sequence[str], "rank": Annotated[int, Ge(1)], "verb": Verb}
    hints["ratio"] = get_type_hints(FixedSettings, include_extras=True)["ratio"]
    parts = [get_type_hints(cls, include_extras=True) for cls in (Training, Resources)]
    hints |= parts[0] | parts[1]
    found.faults.extend(unknown_keys(row, hints, path))
    values = {key: leaf(hints[key], row[key], f"{path}.{key}", found) for key in row if key in hints}
    globs = values.pop("clients", ())
    globs = (globs,) if isinstance(globs, str) else tuple(globs or ())
    rank, verb, ratio = (values.pop(key, None) for key in ("rank", "verb", "ratio"))
    if "clients" not in row or (not globs and f"{path}.clients" in found.values):
        found.faults.append(Fault(f"{path}.clients", "the name or glob of a client, or a list of them", "nothing"))
    found.faults.extend(open_globs(globs, path))
    if not row.keys() - {"clients"}:
        found.faults.append(Fault(path, "something that changes, such as rank", "only clients"))
    lengths = [key for key in ("steps", "epochs") if key in row]
    if lengths and all(f"{path}.{key}" in found.values for key in lengths):
        found.faults.extend(steps_or_epochs(values.get("steps"), values.get("epochs"), path))
    training, taken = ({key: value for key, value in values.items() if key in part} for part in parts)
    return Override(clients=globs, rank=rank, ratio=ratio, verb=verb, training=training, resources=taken)


def open_globs(globs: Sequence[str], path: str) -> Iterator[Fault]:
    for bad in [text for text in globs if not text or re.search(r"\[[^\]]*$", text)]:
        yield Fault(f"{path}.clients", "a glob with every [ closed", display(bad), 'e.g. "client-[1-3]"')


def bind_devices(content: Any, found: Findings) -> tuple[DeviceOverride, ...]:
    """Bind the tables `device`, each to the fields of a device's profile that it changes."""
    if not isinstance(content, list | tuple):
        found.faults.append(Fault("device", "a list of tables, each [[device]]", display(content)))
        return ()
    bound = [bind_device(row, f"device.{place}", found) for place, row in enumerate(content)]
    devices = tuple(device for device in bound if device is not None)
    found.values["device"] = devices
    return devices


def bind_device(row: Any, path: str, found: Findings) -> DeviceOverride | None:
    if not isinstance(row, dict):
        found.faults.append(Fault(path, "a table", display(row)))
        return None
    hints = {key: kind for key, kind in get_type_hints(DeviceProfile, include_extras=True).items() if key in DECLARED}
    hints |= {"clients": str | Sequence[str], "profile": str}
    found.faults.extend(unknown_keys(row, hints, path))
    values = {key: leaf(hints[key], row[key], f"{path}.{key}", found) for key in row if key in hints}
    globs, profile = values.pop("clients", ()), values.pop("profile", None)
    globs = (globs,) if isinstance(globs, str) else tuple(globs or ())
    if not globs:
        found.faults.append(Fault(f"{path}.clients", "the name or glob of a client, or a list of them", "nothing"))
    found.faults.extend(open_globs(globs, path))
    if not row.keys() - {"clients"}:
        found.faults.append(Fault(path, "something that changes, such as profile or memory_gb", "only clients"))
    if profile is not None and profile not in PROFILES:
        meant = nearest(profile, PROFILES)
        hint = f"did you mean {quote(meant)}?" if meant else ""
        found.faults.append(Fault(f"{path}.profile", join_words(PROFILES, joint="or"), display(profile), hint))
        profile = None
    start = PROFILES[profile or next(iter(PROFILES))]
    if all(value is not None for value in values.values()):
        try:
            check_profile(replace(start, name=path, **values))
        except ConfigError as error:
            found.faults.extend(
                replace(fault, path=f"{path}.{fault.path.rpartition('.')[2]}") for fault in error.faults
            )
    return DeviceOverride(clients=globs, profile=profile, fields=values)


def freeze(content: Any) -> Any:
    """Return TOML's lists as tuples, which the frozen settings hold."""
    return tuple(map(freeze, content)) if isinstance(content, list) else content


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
