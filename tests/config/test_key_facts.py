"""Types, ranges, defaults and docstrings of a settings dataclass, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Interval

from fedtune.config.key_facts import field_texts, keys_of, kind_of, range_of, summary, toml


@dataclass(frozen=True)
class Inner:
    """An inner table."""

    steps: Annotated[int, Ge(1)] = 3
    """Steps of it."""


@dataclass(frozen=True)
class Outer:
    """A table
    of two lines."""

    word: Literal["a", "b"]
    """Which."""
    inner: Inner = field(default_factory=Inner)
    rate: Annotated[float, Gt(0)] | None = None
    """How fast."""


def test_types_and_ranges_are_put_into_words() -> None:
    assert kind_of(Annotated[int, Ge(1)] | None) == "whole number or none"
    assert kind_of(Sequence[str] | str) == "list of text or text"
    assert kind_of(Mapping[str, float]) == "table of number by text"
    assert range_of(Annotated[float, Interval(ge=0, lt=1)] | None) == "≥ 0 and < 1"
    assert range_of(Sequence[Annotated[int, Ge(2)]]) == "≥ 2"


def test_keys_carry_the_docstring_under_their_field() -> None:
    word, steps, rate = keys_of(Outer, "outer")
    assert (word.name, word.kind, word.default, word.text) == ("outer.word", '`"a"` | `"b"`', "required", "Which.")
    assert (steps.name, steps.range, steps.default, steps.unit) == ("outer.inner.steps", "≥ 1", "3", "optimizer steps")
    assert (rate.default, rate.unit) == ("none", "no unit")
    assert list(field_texts(Outer)) == ["word", "rate"]
    assert summary(Outer).splitlines() == ["A table", "of two lines."]


def test_a_table_of_changes_has_no_defaults() -> None:
    assert {key.default for key in keys_of(Inner, "override", optional=True)} == {"unchanged"}


def test_values_are_written_as_toml_does() -> None:
    values: list[object] = [None, True, "x", 1e-5, 0.5, (1, 2), {}]
    assert [toml(value) for value in values] == ["none", "true", '"x"', "1e-05", "0.5", "[1, 2]", "{ }"]
