"""Methods and planners by name: those of fedtune, and those that installed packages bring as entry points."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any, TypeVar, cast

from fedtune.data.settings import DataSettings
from fedtune.errors import ConfigError, Fault, type_of
from fedtune.methods import METHODS
from fedtune.methods.method import Method
from fedtune.planning import PLANNERS
from fedtune.planning.planner import PlannerType

METHOD_GROUP, PLANNER_GROUP, DATA_GROUP = "fedtune.methods", "fedtune.planners", "fedtune.data"
"""Groups of entry points. They name a `Method`, a `PlannerType`, and a function that returns rows by client."""
BROKEN = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, NameError),
    *(OSError, RuntimeError, SyntaxError, TypeError, ValueError),
)
"""What the import of another package's module may raise."""

Kind = TypeVar("Kind", Method[Any], PlannerType)


def method_names() -> Sequence[str]:
    """Return the names of all methods, those of other packages last; none of their modules is imported.

    Raises:
        ConfigError: if two methods have one name.
    """
    return [*METHODS, *entry_points_of(METHOD_GROUP, METHODS)]


def planner_names() -> Sequence[str]:
    """Return the names of all planners, as `method_names` does."""
    return [*PLANNERS, *entry_points_of(PLANNER_GROUP, PLANNERS)]


def find_method(name: str) -> Method[Any]:
    """Return a method by its name.

    Raises:
        ConfigError: if there is none, or the package that brings it cannot be used.
    """
    return METHODS[name] if name in METHODS else load("method", name, entry_points_of(METHOD_GROUP, METHODS), Method)


def find_planner(name: str) -> PlannerType:
    """Return a kind of planner by its name, as `find_method` does."""
    return (
        PLANNERS[name]
        if name in PLANNERS
        else load("planner", name, entry_points_of(PLANNER_GROUP, PLANNERS), PlannerType)
    )


def find_data_source(settings: DataSettings) -> Callable[[], Mapping[str, Any]]:
    """Return the function that gives the rows by client, of the entry point that `data.source` names.

    Raises:
        ConfigError: if there is none, or the package that brings it cannot be used.
    """
    name, entries = settings.source, entry_points_of(DATA_GROUP, {})
    if not isinstance(name, str) or name not in entries:
        expected = f"the name of an entry point of {DATA_GROUP} ({', '.join(entries) or 'none is installed'})"
        raise ConfigError(Fault("data.source", expected, repr(name), "install the package that brings it"))
    source = import_entry("data.source", entries[name])
    if not callable(source):
        expected = f"{entry_text(entries[name])} to be a function that returns rows by client"
        raise ConfigError(Fault("data.source", expected, type_of(source)))
    return cast(Callable[[], Mapping[str, Any]], source)


def plugin_rows(settings: DataSettings) -> Mapping[str, Any]:
    """Return the rows by client that the function gives which `data.source` names.

    Raises:
        ConfigError: with the function's own words if it fails, or if it gives something else.
    """
    source = find_data_source(settings)
    entry = entry_points_of(DATA_GROUP, {})[str(settings.source)]
    try:
        rows = source()
    except BROKEN as error:
        got = f"{type(error).__name__}: {error}"
        raise ConfigError(Fault("data.source", f"rows by client from {entry_text(entry)}", got)) from error
    if not isinstance(rows, Mapping) or not rows:
        got = f"{type_of(rows)}{'' if rows else ' without any'}"
        raise ConfigError(Fault("data.source", f"rows by client from {entry_text(entry)}", got, repair(entry)))
    return rows


def import_function(name: str, *, path: str) -> Callable[..., object]:
    """Return the function that a file names as `package.module:function`; `path` is the file's key for messages.

    Raises:
        ConfigError: if Python cannot import it, or it is no function.
    """
    module, _, attribute = name.partition(":")
    expected = "a function that Python can import, as package.module:function"
    hint = "install its package, or put its folder on PYTHONPATH"
    if not module or not attribute:
        raise ConfigError(Fault(path, expected, repr(name)))
    try:
        named: Any = import_module(module)
        for part in attribute.split("."):
            named = getattr(named, part)
    except BROKEN as error:
        raise ConfigError(Fault(path, expected, f"{name!r}, {type(error).__name__}: {error}", hint)) from error
    if not callable(named):
        raise ConfigError(Fault(path, expected, f"{name!r}, which is {type_of(named)}"))
    return cast(Callable[..., object], named)


def entry_points_of(group: str, own: Mapping[str, Any]) -> Mapping[str, EntryPoint]:
    """Return the entry points of a group by name, sorted.

    Raises:
        ConfigError: if one has the name of another, or of what fedtune has itself.
    """
    named: dict[str, EntryPoint] = {}
    for entry in scan(group, tuple(sys.path)):
        if entry.name in own or entry.name in named:
            other = "fedtune itself" if entry.name in own else package(named[entry.name])
            raise ConfigError(
                Fault(
                    f"entry point {group}",
                    "every name once",
                    f"{entry.name!r} from {package(entry)} and from {other}",
                    f"uninstall {package(entry)}, or rename its entry point",
                )
            )
        named[entry.name] = entry
    return named


@lru_cache(maxsize=4)
def scan(group: str, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    # Reads the metadata of every installed package, which takes 20 ms: once per search path, not once per recipe.
    return tuple(sorted(entry_points(group=group), key=lambda entry: entry.name))


def load(table: str, name: str, entries: Mapping[str, EntryPoint], kind: type[Kind]) -> Kind:
    """Import what an entry point names, and check that it can be used.

    Raises:
        ConfigError: naming the package, if its import fails or gives something else.
    """
    if name not in entries:
        hint = f"install the package that brings it, or pass {table}= to fedtune.simulate"
        raise ConfigError(Fault(f"{table}.name", f"the name of an installed {table}", repr(name), hint))
    entry = entries[name]
    loaded = import_entry(f"{table}.name", entry)
    if not isinstance(loaded, kind):
        expected = f"{entry_text(entry)} to be a {kind.__module__}.{kind.__name__}"
        raise ConfigError(Fault(f"{table}.name", expected, type_of(loaded), repair(entry)))
    if fault := fault_of(loaded, name):
        raise ConfigError(Fault(f"{table}.name", f"{entry_text(entry)} {fault}", repr(loaded.name), repair(entry)))
    return loaded


def import_entry(path: str, entry: EntryPoint) -> Any:
    """Return the object that an entry point names; `path` is the recipe's key for messages.

    Raises:
        ConfigError: naming the package, if its import fails.
    """
    try:
        return entry.load()
    except BROKEN as error:
        got = f"{type(error).__name__}: {error}"
        raise ConfigError(Fault(path, f"{entry_text(entry)} to be importable", got, repair(entry))) from error


def fault_of(kind: Method[Any] | PlannerType, name: str) -> str:
    """Return what a method or a planner lacks to be used under a name; empty if nothing."""
    if kind.name != name:
        return f"to have the name {name!r}, as its entry point says"
    defaults = {field.name: field.default for field in fields(kind.settings)} if is_dataclass(kind.settings) else {}
    if defaults.get("name") != name:
        return f"to have a frozen dataclass of settings, whose field name is {name!r} by default"
    return ""


def entry_text(entry: EntryPoint) -> str:
    return f"{entry.value} of {package(entry)}"


def repair(entry: EntryPoint) -> str:
    return f"repair or uninstall {package(entry)}"


def package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.module
