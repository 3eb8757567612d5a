"""The keys of a settings file as facts in words: type, range, default, unit and docstring, read from a dataclass."""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Interval, Le, Lt

from fedtune.config.units import UNITS_BY_PATH, unit_of
from fedtune.search.settings import Range

NOUNS: Mapping[Any, str] = {
    int: "whole number",
    float: "number",
    str: "text",
    bool: "true or false",
    Range: "range",
    Any: "value",
}

REQUIRED, STEM = "required", "default: the file's name without its ending"
"""Defaults that are no values."""


@dataclass(frozen=True)
class Key:
    """One key of a settings file, as its page shows it."""

    name: str
    """Dotted path, e.g. `data.split.kind`."""
    kind: str
    """Type in words."""
    range: str
    """Allowed numbers; empty where every value of the type is allowed."""
    default: str
    """As it would be written in TOML; `REQUIRED` without one."""
    unit: str
    """Empty where the value is no number."""
    text: str
    """The field's docstring, as Markdown."""


@dataclass(frozen=True)
class Table:
    """One table of a settings file, with its keys."""

    title: str
    text: str
    keys: Sequence[Key]


def field_texts(cls: type[Any]) -> Mapping[str, str]:
    """Return the docstring under each field of a dataclass, those of its bases included."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for node, following in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                texts.pop(node.target.id, None)
                if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                    texts[node.target.id] = inspect.cleandoc(str(following.value.value)).strip()
    return texts


def is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def kind_of(annotation: Any) -> str:
    """Return a type in words, without its range.

    >>> kind_of(Annotated[int, Ge(1)] | None)
    'whole number or none'
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if is_union(annotation):
        return " or ".join(dict.fromkeys(kind_of(option) for option in arguments))
    if origin is Annotated:
        return kind_of(arguments[0])
    if origin is Literal:
        return " | ".join(f'`"{word}"`' for word in arguments)
    if origin is Mapping:
        return f"table of {kind_of(arguments[1])} by {kind_of(arguments[0])}"
    if origin is not None:
        return f"list of {kind_of(arguments[0])}"
    return "none" if annotation is type(None) else NOUNS[annotation]


def range_of(annotation: Any) -> str:
    """Return the numbers that a type allows.

    >>> range_of(Annotated[float, Interval(ge=0, lt=1)])
    '≥ 0 and < 1'
    """
    if is_union(annotation):
        return " or ".join(dict.fromkeys(filter(None, map(range_of, get_args(annotation)))))
    if get_origin(annotation) is Annotated:
        bounds = [bound for one in get_args(annotation)[1:] for bound in (one if isinstance(one, Interval) else [one])]
        return " and ".join(bound_text(bound) for bound in bounds)
    return range_of(get_args(annotation)[0]) if get_origin(annotation) not in (None, Literal, Mapping) else ""


def bound_text(bound: Any) -> str:
    match bound:
        case Ge(limit):
            return f"≥ {limit}"
        case Gt(limit):
            return f"> {limit}"
        case Le(limit):
            return f"≤ {limit}"
        case Lt(limit):
            return f"< {limit}"
    raise TypeError(f"expected a bound of annotated_types; got {bound!r}")


def default_of(field: Field[Any]) -> str:
    """Return a field's default as TOML would write it."""
    if field.default is not MISSING:
        return toml(field.default)
    return toml(field.default_factory()) if field.default_factory is not MISSING else REQUIRED


def toml(value: Any) -> str:
    match value:
        case None:
            return "none"
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
        case float():
            return f"{value:g}" if value < 1e-3 or value >= 1e4 else str(value)
        case Mapping():
            return "{ }" if not value else str(dict(value))
        case Sequence():
            return f"[{', '.join(map(toml, value))}]"
    return str(value)


def keys_of(cls: type[Any], path: str, *, only: Sequence[str] | None = None, optional: bool = False) -> Iterator[Key]:
    """Yield the keys of a settings dataclass, those of tables inside it included.

    Args:
        cls: the dataclass.
        path: dotted path of its table; empty for the file itself.
        only: the fields to take, without it all.
        optional: whether every key may be left out, as in a table that changes another one.
    """
    hints = get_type_hints(cls, include_extras=True)
    texts = field_texts(cls)
    for field in fields(cls):
        if only is not None and field.name not in only:
            continue
        name = f"{path}.{field.name}" if path else field.name
        if is_dataclass(hints[field.name]):
            yield from keys_of(hints[field.name], name)
            continue
        yield Key(
            name=name,
            kind=kind_of(hints[field.name]),
            range=range_of(hints[field.name]),
            default="unchanged" if optional else default_of(field),
            unit=UNITS_BY_PATH.get(name) or unit_of(field.name, hints[field.name]),
            text=texts.get(field.name, ""),
        )


def summary(cls: type[Any]) -> str:
    """Return the docstring of a class."""
    return inspect.cleandoc(cls.__doc__ or "")


def table_of(cls: type[Any], path: str, title: str = "") -> Table:
    return Table(title=title or f"`[{path}]`", text=summary(cls), keys=list(keys_of(cls, path)))


def file_keys(cls: type[Any], defaults: Mapping[str, str]) -> Table:
    """Return the keys `name` and `seed` of a file, which stand outside of any table."""
    keys = [replace(key, default=defaults[key.name]) for key in keys_of(cls, "", only=["name", "seed"])]
    return Table("Top level", "Keys outside of any table.", keys)
