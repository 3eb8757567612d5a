from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.errors import ConfigError, ExtraError, StoreError
from fedtune.rounds.events import Note
from fedtune.runs.tracked import send_run, tracker_names, with_trackers
from fedtune.tracking import packages
from tests.report.conftest import write_directory
from tests.tracking.conftest import Remembered
from tests.tracking.conftest import remembered as remembered


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: object())


@pytest.mark.usefixtures("installed")
def test_names_are_known_ones_and_each_counts_once() -> None:
    assert tracker_names(["wandb", "mlflow", "wandb"]) == ("mlflow", "wandb")
    expected = "--track: expected a tracker: tensorboard, mlflow, trackio, wandb; got 'neptune'"
    with pytest.raises(ConfigError, match=expected):
        tracker_names(["neptune"])


@pytest.mark.usefixtures("installed")
def test_the_command_line_adds_to_the_trackers_of_the_recipe(tiny_recipe: Any) -> None:
    recipe = fedtune.bind(tiny_recipe, overrides=['report.trackers=["wandb"]'])
    assert with_trackers(recipe, ["mlflow", "wandb"]).report.trackers == ("wandb", "mlflow")


def test_a_tracker_without_its_package_is_refused_before_anything_is_written(
    tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    tables["report"] = {"trackers": ["mlflow"]}
    with pytest.raises(ExtraError, match="run: pip install mlflow"):
        fedtune.simulate(tables, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("installed")
def test_a_run_is_followed_and_its_result_is_the_same_without_its_tracker(
    tables: dict[str, Any], tmp_path: Path, remembered: Remembered
) -> None:
    notes = list[str]()
    tables["report"] = {"trackers": ["mlflow"], "track_result": True}

    def watch(event: Any) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    remembered.broken = OSError("the server is gone")
    run = fedtune.simulate(tables, out=tmp_path / "run", watch=watch)
    assert run.summary["state"] == "finished"
    assert [text for text in notes if "the server is gone; the run is not tracked" in text]
    remembered.broken = None
    assert "sent" in send_run(run.path, "mlflow")
    assert [round for round, _ in remembered.rows] == [row["round"] for row in run.rounds]
    assert remembered.endings[-1].result == run.adapter


def test_a_run_of_the_past_is_sent_and_named(tmp_path: Path, remembered: Remembered) -> None:
    run = write_directory(tmp_path / "run", name="ward", rounds=3)
    assert send_run(run, "mlflow") == "mlflow: 4 rounds sent, memory"
    assert remembered.begun[0].name == "ward"
    assert send_run(run, "mlflow") == "mlflow: has every round already, memory"


def test_a_copied_recipe_whose_table_is_none_sends_no_clients(tmp_path: Path, remembered: Remembered) -> None:
    run = write_directory(tmp_path / "run", rounds=1)
    (run / "recipe.toml").write_text('name = "ward"\nreport = 3\n')
    assert send_run(run, "mlflow") == "mlflow: 2 rounds sent, memory"


def test_a_tracker_that_does_not_take_a_run_of_the_past_is_an_error(tmp_path: Path, remembered: Remembered) -> None:
    remembered.broken = RuntimeError("quota exceeded")
    with pytest.raises(StoreError, match="mlflow: expected that it takes the run; got quota exceeded; try again"):
        send_run(write_directory(tmp_path / "run"), "mlflow")
