"""The fields of a message one by one: how many bytes each takes, and what it holds, for people to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from google.protobuf.message import Message


@dataclass(frozen=True)
class Field:
    """A field of a message."""

    name: str
    num_bytes: int
    """On the wire, its number and length included."""
    words: str
    value: str


def fields(message: Message, words: Mapping[str, str]) -> Sequence[Field]:
    """Return the fields of a message that are sent, in their order.

    Args:
        message: any.
        words: what each of its fields says.
    """
    shown = []
    for descriptor, value in message.ListFields():
        alone = type(message)()
        _copy(alone, descriptor.name, value)
        shown.append(Field(descriptor.name, len(alone.SerializeToString()), words[descriptor.name], _text(value)))
    return shown


def _copy(message: Any, name: str, value: Any) -> None:
    if isinstance(value, Message):
        getattr(message, name).CopyFrom(value)
    elif hasattr(value, "MergeFrom"):  # a repeated field, or a map
        getattr(message, name).MergeFrom(value)
    else:
        setattr(message, name, value)


def _text(value: Any) -> str:
    """Return a value in short."""
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 16 else f"{value[:12].hex()}... ({len(value)} bytes)"
    if isinstance(value, Message):
        return " ".join(str(value).split())[:60]
    if hasattr(value, "items"):
        return ", ".join(f"{name} {number:g}" for name, number in sorted(value.items()))
    if hasattr(value, "__len__") and not isinstance(value, str):
        several = [getattr(item, "name", "") or str(item) for item in list(value)[:3]]
        return ", ".join(" ".join(text.split()) for text in several) + (
            f", ... ({len(value)})" if len(value) > 3 else ""
        )
    return f"{value:g}" if isinstance(value, float) else str(value)
