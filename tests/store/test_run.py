from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.errors import StoreError
from fedtune.store.run import append_round, check_run, read_summary, vacant, write_recipe, write_summary


def test_a_taken_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"expected a new or an empty folder; .*--fresh"):
        vacant(tmp_path / "demo")
    assert (tmp_path / "demo" / "notes.txt").read_text() == "mine"


def test_a_fresh_run_takes_the_next_free_name(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        run = vacant(tmp_path / "demo", fresh=True)
        write_recipe(run, "name = 'x'")
        names.append(run.name)
    assert names == ["demo", "demo-2", "demo-3"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(StoreError, match="expected a new or an empty folder"):
        vacant(tmp_path / "demo")


def test_lines_and_summary_are_read_back(tmp_path: Path) -> None:
    write_recipe(tmp_path, "")
    append_round(tmp_path, {"round": 0})
    append_round(tmp_path, {"round": 1})
    lines = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert lines == [{"version": 1, "round": 0}, {"version": 1, "round": 1}]
    write_summary(tmp_path, {"name": "demo"})
    assert read_summary(tmp_path) == {"version": 1, "name": "demo"}


def test_a_diverged_loss_is_written_as_null(tmp_path: Path) -> None:
    append_round(tmp_path, {"test": {"loss": float("nan"), "perplexity": float("inf")}, "seconds": [1.5]})
    line = json.loads((tmp_path / "rounds.jsonl").read_text())
    assert line == {"version": 1, "test": {"loss": None, "perplexity": None}, "seconds": [1.5]}


@pytest.mark.parametrize(
    ("content", "message"), [("{torn", "expected JSON"), ("[]", "of version 1"), ('{"version": 9}', "of version 1")]
)
def test_a_summary_that_cannot_be_trusted_is_named(tmp_path: Path, content: str, message: str) -> None:
    write_recipe(tmp_path, "")
    (tmp_path / "summary.json").write_text(content)
    with pytest.raises(StoreError, match=message):
        read_summary(tmp_path)


def test_a_folder_that_is_no_run_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"expected a run directory .*fedtune simulate"):
        read_summary(tmp_path)


def test_a_run_without_a_summary_is_a_run(tmp_path: Path) -> None:
    write_recipe(tmp_path, "")
    check_run(tmp_path)
    with pytest.raises(StoreError, match="No such file"):
        read_summary(tmp_path)
