from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.runs.merge import MergedAdapter


class Scripted:
    def __init__(self) -> None:
        self.named: dict[str, Any] = {}

    def __call__(self, adapters: list[Path], **named: Any) -> MergedAdapter:
        self.named = named
        return MergedAdapter(Path("merged"), 6, 0.9731, [1 / len(adapters)] * len(adapters))


@pytest.fixture
def merge(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    scripted = Scripted()
    monkeypatch.setattr("fedtune.runs.merge.merge", scripted)
    return scripted


def fedtune(*arguments: str) -> Any:
    return CliRunner().invoke(app, arguments)


def test_merge_prints_the_folder_and_says_what_the_sum_is(merge: Scripted) -> None:
    ended = fedtune("merge", "a", "x/b", "--out", "merged", "--weights", "0.5,-1")
    assert ended.stdout == "merged\n"
    assert ended.stderr == "0.5 a + 0.5 b: rank 6, exact\n"
    assert merge.named == {"out": Path("merged"), "weights": [0.5, -1.0], "max_rank": None, "base": None}
    ended = fedtune("merge", "a", "b", "--out", "merged", "--max-rank", "6")
    assert "rank 6, 97.31% of the squared singular values kept" in ended.stderr


def test_adapters_of_one_name_are_named_by_their_paths(merge: Scripted) -> None:
    ended = fedtune("merge", "x/adapter", "y/adapter", "--out", "merged")
    assert ended.stderr == "0.5 x/adapter + 0.5 y/adapter: rank 6, exact\n"


def test_merge_as_json(merge: Scripted) -> None:
    ended = fedtune("merge", "a", "b", "--out", "merged", "--json")
    assert json.loads(ended.stdout) == {"path": "merged", "rank": 6, "energy_kept": 0.9731, "weights": [0.5, 0.5]}
    assert ended.stderr == ""


def test_weights_that_are_no_numbers_are_refused(merge: Scripted) -> None:
    ended = fedtune("merge", "a", "--out", "m", "--weights", "half")
    assert ended.exit_code == 2
    assert "0.5,0.3,0.2" in ended.stderr
