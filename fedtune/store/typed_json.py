"""Parsed JSON as frozen dataclasses, with file, line and key of the first value that has another type.

Written by hand and not with pydantic: the server wing reads run directories and loads no pydantic for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Self, TypeVar, get_args, get_origin, get_type_hints

from fedtune.errors import StoreError

T = TypeVar("T")


class MismatchError(Exception):
    """A value of another type than expected; the path grows while the error travels outwards."""

    def __init__(self, expected: str, got: str) -> None:
        super().__init__(f"expected {expected}; got {got}; restore the file from a copy")
        self.path = ""

    def below(self, step: str) -> Self:
        self.path = step + self.path
        return self


def decode(kind: type[T], value: object, where: str) -> T:
    """Return parsed JSON as a dataclass; keys that the class lacks are ignored, so that later releases may add some.

    Args:
        kind: dataclass of None, numbers, texts, literals, tuples, mappings and dataclasses. A field's metadata may
            name its key as `key`.
        value: as `json.loads` gives it.
        where: file and line, for the error.

    Raises:
        StoreError: naming the key whose value has another type, or that is missing.
    """
    try:
        result: T = decoder_of(kind)(value)  # type: ignore[arg-type]  # a class is hashable
    except MismatchError as error:
        raise StoreError(": ".join(part for part in (where, error.path.lstrip("."), str(error)) if part)) from None
    return result


@functools.cache
def decoder_of(kind: Any) -> Callable[[Any], Any]:
    """Return the function that decodes values of an annotated type; made once per type, since rounds have many."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        return union(arguments)
    if origin is Literal:
        return literal(arguments)
    if origin is tuple:
        return array(decoder_of(arguments[0]))
    if origin is Mapping:
        return mapping(decoder_of(arguments[1]))
    if dataclasses.is_dataclass(kind):
        return record(kind)
    return scalar(kind)


def scalar(kind: type) -> Callable[[Any], Any]:
    def decode_scalar(value: Any) -> Any:
        if type(value) is kind:  # bool is an int to isinstance
            return value
        if kind is float and type(value) is int:
            return float(value)
        raise MismatchError(kind.__name__, f"{value!r:.60}")

    return decode_scalar


def union(kinds: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Take None, and an int where int and float are allowed, as it is; any other value must be of the first kind."""
    otherwise = decoder_of(next(kind for kind in kinds if kind is not NoneType))

    def decode_union(value: Any) -> Any:
        return value if type(value) in kinds else otherwise(value)

    return decode_union


def literal(choices: tuple[Any, ...]) -> Callable[[Any], Any]:
    def decode_literal(value: Any) -> Any:
        if value in choices:
            return value
        raise MismatchError(" or ".join(map(repr, choices)), f"{value!r:.60}")

    return decode_literal


def array(item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decode_array(value: Any) -> Any:
        if not isinstance(value, list):
            raise MismatchError("an array", f"{value!r:.60}")
        index = 0
        try:
            parts = []
            for index, part in enumerate(value):  # noqa: B007 (read below, where it names the bad item)
                parts.append(item(part))
        except MismatchError as error:
            raise error.below(f"[{index}]") from None
        return tuple(parts)

    return decode_array


def mapping(item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decode_mapping(value: Any) -> Any:
        if not isinstance(value, dict):
            raise MismatchError("an object", f"{value!r:.60}")
        key = ""
        try:
            parts = {}
            for key, part in value.items():
                parts[key] = item(part)
        except MismatchError as error:
            raise error.below(f".{key}") from None
        return parts

    return decode_mapping


def record(kind: Any) -> Callable[[Any], Any]:
    hints = get_type_hints(kind)
    entries = [
        (
            entry.name,
            str(entry.metadata.get("key", entry.name)),
            decoder_of(hints[entry.name]),
            entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING,
        )
        for entry in dataclasses.fields(kind)
    ]

    def decode_record(value: Any) -> Any:
        if not isinstance(value, dict):
            raise MismatchError(f"an object ({kind.__name__})", f"{value!r:.60}")
        known, key = {}, ""
        try:
            for name, key, item, required in entries:
                if key in value:
                    known[name] = item(value[key])
                elif required:
                    raise MismatchError(f"the key {key!r}", "none")
        except MismatchError as error:
            raise error.below(f".{key}" if key in value else "") from None
        return kind(**known)

    return decode_record


def nan_to_null(value: Any) -> Any:
    """Return a JSON value with null for every number that JSON cannot hold: the loss of a model that has diverged."""
    if isinstance(value, Mapping):
        return {key: nan_to_null(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_null(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
