from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.config import bind, render

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.usefixtures("unrendered"),
]


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["search", *map(str, arguments)])


@pytest.fixture
def recipe(tables: dict[str, Any], tmp_path: Path) -> Path:
    rest = {key: value for key, value in copy.deepcopy(tables).items() if key not in ("override", "evaluate")}
    rest["client"] = {"steps": 1, "batch": 4}
    search = {"trials": 2, "space": {"client.learning_rate": [0.01, 0.02, 0.04]}}
    path = tmp_path / "recipe.toml"
    path.write_text(render(bind({**rest, "rounds": {"count": 1}, "search": search})))
    return path


def test_a_search_prints_its_table_and_ends_with_the_best_recipe(recipe: Path, tmp_path: Path) -> None:
    done = command(recipe, "-o", tmp_path / "s")
    assert done.exit_code == 0, done.output
    lines = done.stdout.strip().splitlines()
    assert lines[-1] == str(tmp_path / "s" / "best.toml")
    assert any("learning_rate" in line for line in lines)
    assert max(map(len, lines[:-1])) <= 80
    assert len([line for line in done.stderr.splitlines() if line.startswith("trial ")]) == 2
    again = command("--resume", tmp_path / "s", "--json", "--quiet")
    assert again.exit_code == 0, again.output
    content = json.loads(again.stdout.strip().splitlines()[-1])
    assert (content["recipe"], content["state"]) == (str(tmp_path / "s" / "best.toml"), "finished")
    assert len(content["trials"]) == 2


def test_a_dry_run_lists_the_trials(recipe: Path, tmp_path: Path) -> None:
    shown = command(recipe, "--dry-run", "--json", "-o", tmp_path / "s")
    assert shown.exit_code == 0, shown.output
    assert [row["trial"] for row in json.loads(shown.stdout)["rows"]] == [0, 1]
    assert not (tmp_path / "s").exists()
    assert "2 trials" in command(recipe, "--dry-run").stdout


def test_mistakes_end_with_one_message_and_status_two(recipe: Path, tmp_path: Path) -> None:
    for arguments, words in (
        ((recipe, "--set", "search.score=test"), "a model chosen by it has no test score left"),
        ((recipe, "--set", 'search.space={"client.stpes" = [1, 2]}'), "did you mean client.steps?"),
        (("--resume", tmp_path), "expected the folder of a search; got none"),
        ((), "expected a RECIPE, or --resume DIR; got neither"),
        (("--resume", tmp_path, "--dry-run"), "a search goes on as it was begun"),
        ((recipe, "--set", "search.kind=sha"), "search.first_rung"),
    ):
        failed = command(*arguments)
        assert failed.exit_code == 2
        assert words in " ".join(failed.stderr.replace("│", " ").split())
