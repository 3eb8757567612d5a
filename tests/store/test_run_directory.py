from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.errors import StoreError
from fedtune.store.run_directory import (
    check_run,
    check_vacant,
    write_recipe,
    write_summary,
)


def test_a_taken_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match=r"expected a new or an empty folder; .*--resume .*--fresh"):
        check_vacant(tmp_path / "demo")
    assert (tmp_path / "demo" / "notes.txt").read_text() == "mine"


def test_a_fresh_run_takes_the_next_free_name(tmp_path: Path) -> None:
    names = []
    for _ in range(3):
        run = check_vacant(tmp_path / "demo", fresh=True)
        write_recipe(run, "name = 'x'")
        names.append(run.name)
    assert names == ["demo", "demo-2", "demo-3"]


def test_a_file_in_the_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "demo").write_text("")
    with pytest.raises(StoreError, match="expected a new or an empty folder"):
        check_vacant(tmp_path / "demo")


def test_a_summary_is_json_of_version_1_with_null_for_a_diverged_loss(tmp_path: Path) -> None:
    write_summary(tmp_path, {"name": "demo", "loss": float("nan")})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"version": 1, "name": "demo", "loss": None}


def test_a_run_is_a_folder_with_a_recipe_and_others_say_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"expected a run directory .*fedtune simulate"):
        check_run(tmp_path)
    write_recipe(tmp_path, "")
    check_run(tmp_path)
