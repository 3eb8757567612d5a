from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedtune.cli.main import app
from tests.evaluation.conftest import arc_row, write
from tests.terminal.test_task_table import scores

Calls = list[Mapping[str, Any]]


def fedtune(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], env={"COLUMNS": "100"})


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """What the benchmarks are asked with; all answer the same."""
    calls: Calls = []

    def score_tasks(source: str, names: list[str], **options: Any) -> Mapping[str, Any]:
        calls.append({"source": source, "names": names, **options})
        return scores()

    monkeypatch.setattr("fedtune.runs.task_scores.score_tasks", score_tasks)
    return calls


def test_benchmarks_are_asked_with_the_options(calls: Calls, tmp_path: Path) -> None:
    files = ("--data", "arc=a.jsonl", "--data", "arc.shots=b=c.jsonl", "--shots", "2", "--shots", "gsm8k=0")
    ended = fedtune("m", "--tasks", "arc, gsm8k", *files, "--limit", "9", "--output", tmp_path / "s.json", "--quiet")
    assert ended.exit_code == 0, ended.stderr
    [call] = calls
    assert (call["source"], call["names"], call["limit"]) == ("m", ["arc", "gsm8k"], 9)
    assert call["data"] == {"arc": Path("a.jsonl"), "arc.shots": Path("b=c.jsonl")}
    assert call["shots"] == {"arc": 2, "gsm8k": 0}
    assert "flexible" in ended.stdout
    assert "gsm8k: 5 shots" in ended.stdout
    assert json.loads((tmp_path / "s.json").read_text()) == scores()
    assert json.loads(fedtune("m", "--tasks", "arc", "--json", "--quiet").stdout.splitlines()[-1]) == scores()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--limit", "3"], "--limit"),
        (["--shots", "3"], "--shots"),
        (["--base", "x"], "--base"),
        (["--output", "x"], "--output"),
        (["--tasks", "arc", "--examples", "3"], "--examples"),
        (["--tasks", "arc", "--ratio", "0.5"], "--ratio"),
        (["--tasks", "arc", "--data", "arc"], "TASK=PATH"),
        (["--tasks", "arc", "--data", "=x"], "TASK=PATH"),
        (["--tasks", "arc", "--data", "arc=x", "--data", "arc=y"], "once for each task"),
        (["--tasks", "arc", "--shots", "arc=-1"], "from 0 to 999"),
        (["--tasks", "arc", "--shots", "1", "--shots", "2"], "from 0 to 999"),
        (["--tasks", "arc", "--output", "/"], "a file in a folder that is there"),
        (["--tasks", "arc", "--output", "none/x.json"], "a file in a folder that is there"),
        (["--skip-long"], "--skip-long"),
        (["--allow-code-execution"], "--allow-code-execution"),
        (["--temperature", "1"], "--temperature"),
        (["--unconfined"], "--unconfined"),
        (["--tasks", "arc", "--official", "--samples", "2"], "--official, which runs no programs"),
        (["--tasks", "arc", "--official", "--allow-code-execution"], "--official, which runs no programs"),
        (["--data", "a", "--data", "b"], "expected one file"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_scored(
    calls: Calls, arguments: list[str], message: str
) -> None:
    ended = fedtune("runs/none", *arguments)
    assert ended.exit_code == 2
    assert message in " ".join(ended.stderr.replace("│", " ").split())
    assert not calls


def test_a_model_is_scored_from_the_command_line(checkpoints: Mapping[str, Path], tmp_path: Path) -> None:
    file = write(tmp_path / "arc.jsonl", arc_row(1), arc_row(2))
    ended = fedtune(checkpoints["llama"], "--tasks", "arc", "--data", f"arc={file}", "--json", "--quiet")
    assert ended.exit_code == 0, ended.stderr
    assert json.loads(ended.stdout)["tasks"]["arc"]["items"] == 2
    missing = fedtune(checkpoints["llama"], "--tasks", "arc", "--quiet")
    assert missing.exit_code == 2
    assert "downloads nothing" in missing.stderr
