from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from fedtune.config.fs_keys import GROUPS, KEYS
from fedtune.config.recipe import SECTIONS
from fedtune.methods.fedit import FedItSettings


def test_every_key_without_a_counterpart_says_why() -> None:
    assert [key for key, entry in KEYS.items() if not entry.ours and not entry.note] == []
    assert all(GROUPS.values())


def test_every_key_of_a_recipe_that_is_named_exists() -> None:
    tables: dict[str, Any] = {**SECTIONS, "method": FedItSettings}
    known = {"name", "seed"}.union(*(keys(cls, f"{table}.") for table, cls in tables.items()))
    assert {ours for entry in KEYS.values() for ours in entry.ours} - known == set()


def keys(cls: type[Any], prefix: str) -> set[str]:
    """Return the dotted keys of a settings dataclass, those of tables inside it included."""
    names = set[str]()
    for field in fields(cls):
        annotation = get_type_hints(cls)[field.name]
        inner = next((part for part in (annotation, *get_args(annotation)) if is_dataclass(part)), None)
        names |= {f"{prefix}{field.name}"} if inner is None else keys(inner, f"{prefix}{field.name}.")  # type: ignore[arg-type]
    return names
