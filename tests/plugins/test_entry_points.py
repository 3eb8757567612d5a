"""A method, a planner and a data source of another package, by the names of its entry points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.config import bind, render
from fedtune.config.plugins import find_method, find_planner, method_names, planner_names, plugin_rows
from fedtune.errors import ConfigError
from tests.plugins.conftest import Install

METHODS, PLANNERS = "fedtune.methods", "fedtune.planners"


def fault(recipe: Any) -> Any:
    with pytest.raises(ConfigError) as error:
        bind(recipe)
    (only,) = error.value.faults
    return only


def digests(run: Path) -> list[str]:
    return [json.loads(line)["state_digest"] for line in (run / "rounds.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("example")
def test_a_run_takes_method_planner_and_data_by_name_and_resumes(recipe: dict[str, Any], tmp_path: Path) -> None:
    data = {"source": "proverbs", "format": "plugin", "max_tokens": 32, "held_out": 0.2}
    tables = {**recipe, "method": "median", "planner": {"name": "by-examples", "few": 5}, "data": data}
    run = fedtune.simulate(tables, out=tmp_path / "run")
    lines = [json.loads(line) for line in (run.path / "rounds.jsonl").read_text().splitlines()]
    assert {name: client["steps"] for name, client in lines[1]["clients"].items()} == {"north": 1, "south": 3}
    assert run.summary["clients"]["north"]["examples"] == 4
    assert run.summary["clients"]["south"]["examples"] == 8
    assert run.summary["method"] == "median"
    assert fedtune.bind(run.path / "recipe.toml") == fedtune.bind(tables, overrides=["model.dtype=float32"])

    longer = fedtune.simulate(resume=run.path, recipe={**tables, "rounds": {"count": 3}})
    whole = fedtune.simulate({**tables, "rounds": {"count": 3}}, out=tmp_path / "whole")
    assert digests(longer.path) == digests(whole.path)


@pytest.mark.usefixtures("example")
def test_worker_processes_serve_methods_planners_and_data_that_have_a_name(
    recipe: dict[str, Any], tmp_path: Path
) -> None:
    data = {"source": "proverbs", "format": "plugin", "max_tokens": 32}
    tables = {**recipe, "method": "median", "planner": "by-examples", "data": data, "rounds": {"count": 1}}
    here = fedtune.simulate(tables, out=tmp_path / "here")
    there = fedtune.simulate({**tables, "engine": {"name": "processes", "workers": 2}}, out=tmp_path / "there")
    assert digests(here.path) == digests(there.path)


@pytest.mark.usefixtures("example")
def test_names_are_listed_after_those_of_fedtune_and_settings_are_bound() -> None:
    assert method_names()[-1] == "median"
    assert planner_names()[-1] == "by-examples"
    assert find_method("median").name == "median"
    assert find_planner("by-examples").settings().few == 6


@pytest.mark.usefixtures("example")
def test_settings_of_a_plug_in_are_checked_like_all_others(recipe: dict[str, Any]) -> None:
    bound = bind({**recipe, "planner": {"name": "by-examples", "few": 2}})
    assert vars(bound.planner)["few"] == 2
    assert bind(render(bound)) == bound
    assert fault({**recipe, "planner": {"name": "by-examples", "few": 0}}).path == "planner.few"
    assert fault({**recipe, "planner": {"name": "by-examples", "fwe": 1}}).hint == "did you mean planner.few?"
    assert fault({**recipe, "method": {"name": "median"}, "override": [{"clients": "a", "rank": 2}]}).path == "method"
    assert "median of factors" in fault({**recipe, "method": "median", "pruning": {}}).got


@pytest.mark.usefixtures("example")
def test_an_unknown_name_lists_all_that_are_known(recipe: dict[str, Any]) -> None:
    unknown = fault({**recipe, "method": "mode"})
    assert '"flora"' in unknown.expected
    assert '"median"' in unknown.expected
    assert fault({**recipe, "method": "medain"}).hint == 'did you mean "median"?'


def test_without_the_package_its_names_are_unknown(recipe: dict[str, Any]) -> None:
    unknown = fault({**recipe, "method": "median"})
    assert (unknown.path, unknown.got) == ("method.name", "'median'")
    assert "install the package" in unknown.hint
    data = bind({**recipe, "data": {"source": "proverbs", "format": "plugin"}})
    from fedtune.runs.local import prepare

    with pytest.raises(ConfigError, match=r"data\.source.*none is installed"):
        prepare(data)


@pytest.mark.parametrize(("group", "name"), [(METHODS, "flora"), (PLANNERS, "deadline")])
def test_a_name_of_fedtune_itself_cannot_be_taken(
    install: Install, recipe: dict[str, Any], group: str, name: str
) -> None:
    install("shadow", "METHOD = None", {group: {name: "shadow:METHOD"}})
    clash = fault(recipe)
    assert clash.path == f"entry point {group}"
    assert "shadow 1.0 and from fedtune itself" in clash.got


def test_two_packages_cannot_have_one_name(install: Install, recipe: dict[str, Any]) -> None:
    for package in ("first", "second"):
        install(package, "METHOD = None", {METHODS: {"twin": f"{package}:METHOD"}})
    assert {"first 1.0", "second 1.0"} <= set(fault(recipe).got.replace("'twin' from ", "").split(" and from "))


@pytest.mark.parametrize(
    ("source", "expected", "got"),
    [
        ("import absent_package", "importable", "ModuleNotFoundError"),
        ("1 / 0", "importable", "ZeroDivisionError"),
        ("METHOD = 3", "to be a fedtune.methods.method.Method", "an int"),
        ("from fedtune.methods.fedit import METHOD", "to have the name 'broken'", "'fedit'"),
        (
            "from dataclasses import replace\nfrom fedtune.methods.fedit import METHOD\n"
            "METHOD = replace(METHOD, name='broken')",
            "a frozen dataclass of settings, whose field name is 'broken'",
            "'broken'",
        ),
    ],
)
def test_a_broken_package_is_named_and_costs_no_other_recipe(
    install: Install, recipe: dict[str, Any], source: str, expected: str, got: str
) -> None:
    install("broken", source, {METHODS: {"broken": "broken:METHOD"}})
    broken = fault({**recipe, "method": "broken"})
    assert broken.path == "method.name"
    assert "broken:METHOD of broken 1.0" in broken.expected
    assert expected in broken.expected
    assert got in broken.got
    assert "uninstall broken 1.0" in broken.hint
    bind(recipe)


@pytest.mark.parametrize(
    ("source", "got"),
    [
        ("def rows():\n    raise ValueError('no database')", r"ValueError: no database"),
        ("def rows():\n    return {}['x']", r"KeyError: 'x'"),
        ("def rows():\n    return [1]", r"a list"),
        ("def rows():\n    return {}", r"a dict without any"),
    ],
)
def test_a_data_source_that_fails_is_one_error_with_its_words(
    install: Install, recipe: dict[str, Any], source: str, got: str
) -> None:
    install("broken", source, {"fedtune.data": {"sick": "broken:rows"}})
    settings = bind({**recipe, "data": {"source": "sick", "format": "plugin"}}).data
    with pytest.raises(ConfigError, match=rf"data\.source: expected rows by client from broken:rows of .*; got {got}"):
        plugin_rows(settings)
