"""Settings dataclasses as canonical JSON, checked against the installed dataclass when they come back."""

from __future__ import annotations

import json
import operator
import types
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fedtune.errors import WireError
from fedtune.wire.expect import LARGEST, MAX_NUMBER

MAX_SETTINGS_BYTES = 16 * 1024
BOUNDS: Mapping[str, Callable[[Any, Any], bool]] = {name: getattr(operator, name) for name in ("ge", "gt", "le", "lt")}
"""Comparisons by the names that annotated_types gives to limits."""

Settings = TypeVar("Settings")


def encode(settings: Any) -> bytes:
    """Return a settings dataclass as canonical JSON: sorted keys, ASCII, no spaces.

    Every field is written out, but for those that a release added (`omit_default`), where they are at their default:
    settings that an earlier release can read are written as it writes them.

    Raises:
        WireError: if a value is not finite.
    """
    try:
        values = {name: getattr(settings, name) for name in _travelling(type(settings))}  # type: ignore[arg-type]  # classes are hashable
        added = _later_defaults(type(settings))  # type: ignore[arg-type]
        return _canonical({name: value for name, value in values.items() if name not in added or value != added[name]})
    except ValueError:
        raise WireError(f"expected finite settings; got {settings!r}") from None


def decode(data: bytes, schema: type[Settings]) -> Settings:
    """Return the settings that `encode` wrote.

    Raises:
        WireError: if the bytes are no canonical JSON, a key is missing or unknown, or a value is outside its field.
    """
    if len(data) > MAX_SETTINGS_BYTES:
        raise WireError(f"settings: expected at most {MAX_SETTINGS_BYTES} bytes; got {len(data)}")
    try:
        # ASCII alone: of bytes, the parser guesses an encoding and imports its codec.
        values = json.loads(data.decode("ascii"))
        # Also what refuses repeated keys and NaN: neither survives being written again.
        canonical = _canonical(values) == data
    except (ValueError, RecursionError):
        canonical = False
    hints = _travelling(schema)  # type: ignore[arg-type]  # classes are hashable
    added = _later_defaults(schema)  # type: ignore[arg-type]
    if not canonical or not isinstance(values, dict) or values.keys() | added.keys() != hints.keys():
        raise WireError(
            f"settings: expected canonical JSON with the keys {sorted(hints)}; got {data[:200]!r}; "
            "run the same release of fedtune on both sides"
        )
    # Types and bounds as in a recipe: a server must not ask for what no recipe could.
    for name, value in values.items():
        # Left out where it is the default, so that settings have one encoding.
        if name in added and value == added[name]:
            raise WireError(f"settings.{name}: expected it left out at its default; got {value!r}")
        if not _fits(value, hints[name]):
            raise WireError(f"settings.{name}: expected {hints[name]}; got {value!r}")
    return schema(**values)


@cache  # else the annotations are compiled anew for every message
def _travelling(schema: Any) -> Mapping[str, Any]:
    """Return the type hints of the fields that are part of the settings on the wire."""
    hints = get_type_hints(schema, include_extras=True)
    return {field.name: hints[field.name] for field in fields(schema) if field.metadata.get("travels", True)}


@cache
def _later_defaults(schema: Any) -> Mapping[str, Any]:
    """Return the defaults of the travelling fields that a release added; absent, they mean as before."""
    names = _travelling(schema)
    return {f.name: f.default for f in fields(schema) if f.name in names and f.metadata.get("omit_default")}


def _canonical(values: Any) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _fits(value: Any, hint: Any) -> bool:
    """Say whether a value read from JSON is one of a field's annotated type."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _fits(value, args[0]) and all(_within(value, bound) for bound in args[1:])
    if origin is Literal:
        return value in args
    if origin in (Union, types.UnionType):
        return any(_fits(value, choice) for choice in args)
    if hint is float:  # finite, being canonical; a whole number is the float that it equals
        return type(value) in (float, int) and abs(value) <= LARGEST
    if hint is int:
        return type(value) is int and abs(value) < MAX_NUMBER
    # Not isinstance: True is an int to Python, and would pass for one step.
    return type(value) is hint


def _within(value: Any, bound: object) -> bool:
    """Say whether a value keeps to one of annotated_types' bounds; an Interval has several of these limits."""
    limits = {name: getattr(bound, name) for name in BOUNDS if getattr(bound, name, None) is not None}
    if not limits:
        raise TypeError(f"expected a bound of annotated_types; got {bound!r}")
    return all(BOUNDS[name](value, limit) for name, limit in limits.items())
