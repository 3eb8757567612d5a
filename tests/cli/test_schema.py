"""`fedtune schema`: JSON alone on standard output, every command with its options, one sentence for a wrong part."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from docs.command_pages import commands
from fedtune.cli.main import app

run = CliRunner().invoke


@pytest.mark.parametrize("part", ["recipe", "site", "server"])
def test_a_schema_is_printed_as_json(part: str) -> None:
    printed = run(app, ["schema", part])
    assert printed.exit_code == 0
    assert "\x1b" not in printed.stdout
    assert json.loads(printed.stdout)["$schema"].endswith("2020-12/schema")


def test_every_command_is_listed_with_its_options() -> None:
    listed = {one["name"]: one for one in json.loads(run(app, ["schema", "commands"]).stdout)["commands"]}
    for name, command in commands():
        own = listed[name]
        assert own["help"]
        shown = {option for one in own["options"] for option in one["names"]}
        assert {option for param in command.params for option in param.opts if option.startswith("-")} == shown, name
        assert all(one["help"] and one["type"] for one in (*own["options"], *own["arguments"])), name
    assert {"fedtune-edge join", "fedtune-edge status"} <= listed.keys()
    workers = next(one for one in listed["fedtune simulate"]["options"] if one["names"] == ["--workers"])
    assert (workers["type"], workers["minimum"]) == ("integer", 1)
    assert listed["fedtune simulate"]["examples"][0] == "fedtune simulate recipe.toml"


def test_without_a_part_all_are_printed() -> None:
    printed = json.loads(run(app, ["schema"]).stdout)
    assert list(printed) == ["fedtune", "recipe", "site", "server", "commands"]


def test_another_part_is_refused() -> None:
    printed = run(app, ["schema", "wire"])
    assert printed.exit_code == 2
    assert "is not one of" in printed.output
