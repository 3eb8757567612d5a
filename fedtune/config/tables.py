"""From tables to settings dataclasses: pydantic checks each value by its field's type, and every fault is noted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from datetime import date
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedtune.config.error_text import allows, choices, describe, display, join_words, nearest, quote
from fedtune.config.reading import value_of
from fedtune.config.recipe import SECTIONS
from fedtune.data.settings import Split
from fedtune.errors import Fault

Settings = TypeVar("Settings")

STRICT = ConfigDict(strict=True, allow_inf_nan=False)


class UnboundKeyError(Exception):
    """A rule read a key that has a fault of its own."""


class PartialTable:
    """A settings dataclass without the keys that are at fault; reading one of those raises `UnboundKeyError`.

    `isinstance` takes it for the dataclass, so that rules choose the branch that they choose for a whole table.
    """

    def __init__(self, cls: type[Any], values: Mapping[str, Any]) -> None:
        self.__dict__.update(values, _cls=cls)

    def __getattr__(self, key: str) -> Any:
        raise UnboundKeyError(key)

    @property  # type: ignore[misc]  # what isinstance asks; typeshed has it as a plain attribute
    def __class__(self) -> type[Any]:
        return cast(type[Any], self.__dict__["_cls"])


AT_FAULT: Any = PartialTable(object, {})
"""In place of a value that is none of its type."""


def freeze_table(cls: type[Settings], values: Mapping[str, Any], *, complete: bool) -> Settings:
    """Return a table's settings, of the good values alone if it is not complete."""
    if complete:
        return cls(**values)
    return cast(Settings, PartialTable(cls, {key: value for key, value in values.items() if value is not AT_FAULT}))


def apply_rule(rule: Callable[[Settings], Iterable[Fault]], table: Settings) -> Sequence[Fault]:
    """Return the faults that a rule finds; none if it reads a key with a fault of its own."""
    try:
        return list(rule(table))
    except UnboundKeyError:
        return []


def bind_table(cls: type[Settings], content: Any, path: str, faults: list[Fault]) -> Settings:
    """Return the settings that a table holds, without those keys whose faults were noted.

    Args:
        cls: a settings dataclass.
        content: as read from TOML.
        path: of the table, for messages.
        faults: receives what is wrong.
    """
    if not isinstance(content, dict):
        faults.append(Fault(path, "a table", display(content)))
        return freeze_table(cls, {}, complete=False)
    before = len(faults)
    settings: Sequence[Any] = fields(cls)  # type: ignore[arg-type]  # typing has no bound for a dataclass's type
    faults.extend(unknown_keys(content, [setting.name for setting in settings], path))
    hints = get_type_hints(cls, include_extras=True)
    values = dict[str, Any]()
    for setting in settings:
        key = f"{path}.{setting.name}"
        if setting.name in content:
            values[setting.name] = bind_value(hints[setting.name], content[setting.name], key, faults)
        elif setting.default is not MISSING:
            values[setting.name] = setting.default
        elif setting.default_factory is not MISSING:
            values[setting.name] = setting.default_factory()
        else:
            faults.append(Fault(key, describe(hints[setting.name]), "nothing"))
    return freeze_table(cls, values, complete=len(faults) == before)


def bind_value(annotation: Any, content: Any, path: str, faults: list[Fault]) -> Any:
    """Return one value as its type asks, or `AT_FAULT` after noting why not."""
    if is_dataclass(annotation) and isinstance(annotation, type):
        return bind_table(annotation, content, path, faults)
    if get_origin(annotation) is Mapping and isinstance(content, dict):
        keys, kind = get_args(annotation)
        return bind_mapping(get_args(keys), kind, content, path, faults)
    if content == "none" and allows(annotation, type(None)) and not allows(annotation, str):
        content = None
    try:
        return TypeAdapter(annotation, config=STRICT).validate_python(freeze(content))
    except ValidationError:
        faults.append(type_fault(annotation, content, path))
        return AT_FAULT


def bind_mapping(known: Collection[str], kind: Any, content: Mapping[str, Any], path: str, faults: list[Fault]) -> Any:
    """Return a table of known keys whose values are all of one kind, or `AT_FAULT` after noting why not."""
    before = len(faults)
    faults.extend(unknown_keys(content, known, path))
    values = {key: bind_value(kind, value, f"{path}.{key}", faults) for key, value in content.items() if key in known}
    return AT_FAULT if len(faults) > before else values


def freeze(content: Any) -> Any:
    """Return TOML's lists as tuples, which the frozen settings hold, and its dates as text."""
    if type(content) is date:  # without quotes, as TOML allows
        return content.isoformat()
    return tuple(map(freeze, content)) if isinstance(content, list) else content


def type_fault(annotation: Any, content: Any, path: str) -> Fault:
    """Return the fault of a value that is none of its type, with the allowed one that is nearest."""
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
    faults: list[Fault] = []
    bind_value(annotation, content, "", faults)
    return not faults


def unknown_keys(content: Mapping[str, Any], known: Collection[str], path: str) -> Iterator[Fault]:
    """Yield a fault for each key that is not known, with the nearest that is."""
    for key in content:
        if key in known:
            continue
        prefix = f"{path}." if path else ""
        meant = nearest(key, known)
        elsewhere = [home for home in section_keys() if home.rpartition(".")[2] == key]
        if meant:
            hint = f"did you mean {prefix}{meant}?"
        elif elsewhere:
            hint = f"it belongs in {join_words(elsewhere, joint='or')}"
        elif longer := [name for name in known if name.endswith(f"_{key}")]:
            hint = f"did you mean {join_words([prefix + name for name in longer], joint='or')}?"
        else:
            hint = f"the keys are {join_words(known)}"
        yield Fault(f"{prefix}{key}", "", "unknown key", hint)


def section_keys() -> Sequence[str]:
    """Return the keys of a recipe's tables with their paths."""
    tables: Mapping[str, Any] = {**SECTIONS, "data.split": Split}
    return [f"{table}.{setting.name}" for table, cls in tables.items() for setting in fields(cls)]
