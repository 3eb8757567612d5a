"""Every value is checked by its field's type; a rule is left out only where a key that it reads is at fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date

import pytest

from fedtune.config.tables import AT_FAULT, UnboundKeyError, apply_rule, bind_table, bind_value, freeze_table
from fedtune.errors import Fault


@dataclass(frozen=True)
class Inner:
    size: int = 1
    name: str = "x"


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner = field(default_factory=Inner)
    limit: float | None = None


def test_a_table_without_faults_is_its_dataclass() -> None:
    faults: list[Fault] = []
    assert bind_table(Outer, {"count": 3, "inner": {"size": 2}}, "outer", faults) == Outer(3, Inner(2))
    assert not faults


def test_a_table_with_faults_keeps_its_good_keys_and_refuses_the_others() -> None:
    faults: list[Fault] = []
    outer = bind_table(Outer, {"count": "3", "inner": {"size": "2"}, "typo": 1}, "outer", faults)
    assert [fault.path for fault in faults] == ["outer.typo", "outer.count", "outer.inner.size"]
    assert isinstance(outer, Outer)
    assert (outer.limit, outer.inner.name) == (None, "x")
    with pytest.raises(UnboundKeyError, match="count"):
        print(outer.count)
    with pytest.raises(UnboundKeyError, match="size"):
        print(outer.inner.size)


def test_a_key_with_a_default_is_not_replaced_by_it_when_it_is_at_fault() -> None:
    outer = bind_table(Outer, {"count": 3, "limit": "x"}, "outer", [])
    with pytest.raises(UnboundKeyError, match="limit"):
        print(outer.limit)


def too_many(outer: Outer) -> Iterator[Fault]:
    if outer.count > 2:
        yield Fault("count", "at most 2", str(outer.count))
    if outer.inner.size > outer.count:
        yield Fault("inner.size", f"at most {outer.count}", str(outer.inner.size))


def test_a_date_without_quotes_is_its_text_and_no_number() -> None:
    faults: list[Fault] = []
    assert bind_value(str | None, date(2026, 11, 29), "data.date", faults) == "2026-11-29"
    assert not faults
    bind_value(int, date(2026, 11, 29), "seed", faults)
    assert faults


def test_a_rule_finds_faults_or_is_left_out_whole() -> None:
    assert [fault.path for fault in apply_rule(too_many, Outer(3, Inner(4)))] == ["count", "inner.size"]
    lacking = freeze_table(Outer, {"count": 3, "inner": AT_FAULT}, complete=False)
    assert apply_rule(too_many, lacking) == []


def test_a_mistyped_key_in_a_rule_is_an_error_and_switches_nothing_off() -> None:
    def mistyped(outer: Outer) -> Iterator[Fault]:
        yield Fault("", "", str(outer.cuont))  # type: ignore[attr-defined]  # what mypy says of such a rule

    with pytest.raises(AttributeError):
        apply_rule(mistyped, Outer(1))


def test_a_value_of_the_wrong_type_is_no_value() -> None:
    faults: list[Fault] = []
    assert bind_value(int, True, "a", faults) is AT_FAULT
    assert bind_value(int | None, "none", "b", faults) is None
    assert [fault.path for fault in faults] == ["a"]
