"""The schemas of settings files: what binds is valid, what does not is refused, and no key is missing."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Interval

from fedtune.config.json_schema import recipe_schema, server_schema, site_schema, value_schema
from fedtune.config.key_tables import recipe_tables, server_tables, site_tables
from fedtune.config.recipe import SECTIONS
from fedtune.methods import METHODS
from fedtune.planning import PLANNERS

Draft202012Validator: Any = import_module("jsonschema").Draft202012Validator  # a package without types
ROOT = Path(__file__).parents[2]
SMALL: Mapping[str, Any] = {"model": {"base": "embedded"}, "data": {"source": "x.jsonl"}}


@cache
def validator() -> Any:
    return Draft202012Validator(recipe_schema())


def errors(tables: Mapping[str, Any]) -> list[str]:
    return [error.json_path for error in validator().iter_errors(tables)]


def test_every_recipe_and_file_of_the_repository_is_valid() -> None:
    recipes = sorted((ROOT / "simulations").rglob("*.toml"))
    assert len(recipes) > 100
    assert not [(path.name, found) for path in recipes if (found := errors(tomllib.loads(path.read_text())))]
    site = Draft202012Validator(site_schema())
    for path in (ROOT / "clients").rglob("site.toml"):
        assert site.is_valid(tomllib.loads(path.read_text())), path
    server = tomllib.loads((ROOT / "server" / "link" / "server.toml").read_text())
    assert Draft202012Validator(server_schema()).is_valid(server)


@pytest.mark.parametrize("make", [recipe_schema, site_schema, server_schema])
def test_the_schemas_are_schemas_and_json(make: Any) -> None:
    schema = make()
    Draft202012Validator.check_schema(schema)
    assert json.loads(json.dumps(schema, allow_nan=False)) == schema


@pytest.mark.parametrize(
    ("tables", "path"),
    [
        ({"client": {"stpes": 3}}, "$.client"),
        ({"client": {"steps": 0}}, "$.client.steps"),
        ({"client": {"dropout": 1.0}}, "$.client.dropout"),
        ({"rounds": {"count": "3"}}, "$.rounds.count"),
        ({"rounds": {"schedule": "sine"}}, "$.rounds.schedule"),
        ({"method": {"name": "flora", "max_rnk": 4}}, "$.method"),
        ({"method": "florra"}, "$.method"),
        ({"override": [{"rank": 4}]}, "$.override[0]"),
        ({"device": [{"clients": "a", "memory_gb": 0}]}, "$.device[0].memory_gb"),
        ({"name": "../x"}, "$.name"),
        ({"rouns": {}}, "$"),
    ],
)
def test_what_binding_refuses_is_refused_with_its_place(tables: Mapping[str, Any], path: str) -> None:
    assert errors({**SMALL, **tables}) == [path]


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"method": "fedspine", "planner": "deadline", "engine": "processes"},
        {"method": {"name": "fedit", "robust": "multikrum", "server_optimizer": {"name": "fedadam"}}},
        {"method": {"name": "of-a-package", "anything": 1}},
        {"rounds": {"max_norm": "none", "cohort": 0.5}},
        {"data": {"preset": "dolly", "split": "files"}},
        {"override": [{"clients": ["a", "b*"], "rank": 4, "steps": 3}], "device": [{"clients": "a", "modes": [0.5]}]},
        {"search": {"space": {"client.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True}}}},
    ],
)
def test_short_forms_presets_and_names_of_packages_are_valid(tables: Mapping[str, Any]) -> None:
    assert errors({**SMALL, **tables}) == []


def names(schema: Any) -> set[str]:
    """Return every key that a schema knows."""
    if isinstance(schema, list):
        return {name for one in schema for name in names(one)}
    if not isinstance(schema, dict):
        return set()
    own = set(schema.get("properties", ()))
    inner = [value for key, value in schema.items() if key != "properties"] + [*schema.get("properties", {}).values()]
    return own | {name for one in inner for name in names(one)}


def test_every_key_that_the_pages_list_is_in_the_schema() -> None:
    pages = [key.name for tables in recipe_tables().values() for table in tables for key in table.keys]
    assert {name.rpartition(".")[2] for name in pages if not name.startswith("search.space.")} <= names(recipe_schema())
    for tables, schema in ((site_tables(), site_schema()), (server_tables(), server_schema())):
        assert {key.name.rpartition(".")[2] for table in tables for key in table.keys} <= names(schema)


def test_every_key_that_binds_is_in_its_table() -> None:
    tables = recipe_schema()["properties"]
    for name, cls in SECTIONS.items():
        own = tables[name] if "properties" in tables[name] else tables[name]["anyOf"][0]
        assert set(own["properties"]) == {field.name for field in fields(cls)}, name
        assert all(len(one.get("description", "long enough")) > 5 for one in own["properties"].values()), name
    for table, kinds in (("method", METHODS), ("planner", PLANNERS)):
        options = {one["title"]: one for one in tables[table]["anyOf"] if "title" in one}
        for name, kind in kinds.items():
            settings: Any = kind.settings
            assert set(options[name]["properties"]) == {field.name for field in fields(settings)}


def test_a_key_has_its_default_unit_and_range() -> None:
    keys = recipe_schema()["properties"]["client"]["properties"]
    assert keys["batch"]["x-unit"] == "examples"
    assert keys["batch"]["minimum"] == 1
    assert keys["batch"]["description"].endswith("Unit: examples.")
    assert keys["clip_norm"]["default"] in ("none", 1.0)


def test_types_become_schemas() -> None:
    assert value_schema(Annotated[int, Ge(2)]) == {"type": "integer", "minimum": 2}
    assert value_schema(str | None) == {"type": "string"}
    assert value_schema(Literal["a", "b"]) == {"enum": ["a", "b"]}
    assert value_schema(Annotated[float, Gt(0)] | None)["anyOf"][1] == {"const": "none"}
    assert value_schema(Mapping[Literal["x"], str])["propertyNames"] == {"enum": ["x"]}
    assert value_schema(Annotated[float, Interval(gt=0, lt=1)])["exclusiveMaximum"] == 1
    with pytest.raises(TypeError, match="a bound of annotated_types"):
        value_schema(Annotated[int, "words"])
