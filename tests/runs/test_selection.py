"""Runs that keep their best round, end early, are stopped and resumed; the test scores are a script."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import bind
from fedtune.errors import ConfigError, StoreError
from fedtune.methods.method import GlobalModel
from fedtune.rounds.events import Event, Note
from fedtune.runs.context import ModelScores
from fedtune.runs.export import export
from fedtune.runs.local import Experiment, prepare, run_context, transport
from fedtune.runs.runner import run_recipe
from fedtune.runs.trained_run import load_run
from fedtune.runs.verification import check_results
from fedtune.store import peft, result
from fedtune.store.history import replay_journal
from fedtune.store.run_directory import write_recipe
from fedtune.store.verify import verify
from tests.runs.conftest import read_lines, read_summary, stopped_in

LOSSES = (4.0, 3.0, 2.0, 2.5, 2.25, 1.0)
"""Test losses of the base and of the rounds; the last one is never reached with a patience of 2."""
Tables = dict[str, Any]


def score(tuned: GlobalModel, *, round: int, test: bool, clients: bool, structure: Any = None) -> ModelScores:
    held_out = {"client-0": {"loss": float(sum(f.b.sum() for f in tuned.adapter.values())), "examples": 1}}
    return ModelScores({"loss": LOSSES[round]} if test else None, held_out if clients else {})


def play(tables: Tables, run: Path, *, resume: bool = False, **rounds: Any) -> tuple[Mapping[str, Any], list[str]]:
    """Run a recipe with scripted test losses; return its summary and the notes."""
    experiment = prepare(bind(tables | {"rounds": {"count": 5, **rounds}}))
    write_recipe(run, "name = 'tiny'")
    context, notes = run_context(experiment), list[str]()

    def watch(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    with transport(experiment) as engine:
        context = replace(context, score=score)
        return run_recipe(context, run, engine, resume=resume, watch=watch), notes


@pytest.fixture
def tables(tables: Tables) -> Tables:
    return {**tables, "client": {**tables["client"], "steps": 1}, "report": {"plots": False}}


def test_the_best_round_is_the_result_and_both_are_named(tables: Tables, tmp_path: Path) -> None:
    best, last, short = (tmp_path / name for name in ("best", "last", "short"))
    kept, notes = play(tables, best, keep="best", patience=2)
    whole, _ = play(tables, last, patience=2)
    play(tables, short, count=2)
    assert [line["round"] for line in read_lines(best)] == [0, 1, 2, 3, 4]
    assert any("ends after round 4 of 5: no better loss in 2 evaluations after round 2" in note for note in notes)
    digests = [line["state_digest"] for line in read_lines(best)]
    assert kept["selection"] == {
        "keep": "best",
        "metric": "loss",
        "round": 2,
        "best": {"round": 2, "score": 2.0, "state_digest": digests[2]},
        "last": {"round": 4, "score": 2.25, "state_digest": digests[4]},
        "ended": "no better loss in 2 evaluations after round 2 (rounds.patience)",
    }
    assert peft.digest(best / "adapter") == peft.digest(short / "adapter") != peft.digest(last / "adapter")
    assert result.read(best)[1]["round"] == 2
    assert kept["after"]["test"] == {"loss": 2.0}
    assert whole["after"]["test"] == {"loss": 2.25}
    # The clients' rows are scored with the model that is the result, and after the last round of an early end too.
    assert kept["after"]["held_out"] == read_summary(short)["after"]["held_out"]
    assert whole["after"]["held_out"] == read_lines(last)[-1]["held_out"] != {}
    check_results(best)
    verify(best)


def test_the_state_of_the_best_round_stays_until_a_better_one_comes(tables: Tables, tmp_path: Path) -> None:
    run = tmp_path / "run"
    play(tables, run, keep="best", patience=2)
    digests = [line["state_digest"] for line in read_lines(run)]
    assert {path.name for path in (run / "blobs").glob("??/*")} == {digests[2], digests[4]}
    assert replay_journal(run)[0].kept_round == 2
    assert load_run(run).tuned.adapter.keys() == load_run(run, last=True).tuned.adapter.keys()
    lost = run / "blobs" / digests[2][:2] / digests[2]
    lost.unlink()
    with pytest.raises(StoreError, match="the state of round 2, the best one"):
        verify(run)


@pytest.mark.parametrize("stopped", [2, 3, 4])
def test_a_run_that_is_stopped_anywhere_ends_as_if_it_had_not_been(
    stopped: int, tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, again = tmp_path / "whole", tmp_path / "again"
    expected, _ = play(tables, whole, keep="best", patience=2)
    with monkeypatch.context() as patch:
        patch.setattr("fedtune.runs.local.perform", stopped_in(stopped, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            play(tables, again, keep="best", patience=2)
    assert read_summary(again)["selection"]["round"] == min(stopped - 1, 2)
    got, _ = play(tables, again, keep="best", patience=2, resume=True)
    assert got["selection"] == expected["selection"]
    assert got["after"] == expected["after"]
    assert peft.digest(again / "adapter") == peft.digest(whole / "adapter")
    check_results(again)
    finished, notes = play(tables, again, keep="best", patience=2, resume=True)
    assert any("the run ended after round 4: no better loss" in note for note in notes)
    assert finished["selection"] == expected["selection"]
    assert len(read_lines(again)) == 5


def test_a_crash_between_a_rounds_line_and_the_note_that_keeps_its_state_loses_nothing(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"

    def keep(journal: Any, round: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedtune.store.run_journal.RunJournal.keep", keep)
        with pytest.raises(KeyboardInterrupt):
            play(tables, run, keep="best", patience=2)
    assert replay_journal(run)[0].kept_round == 0
    got, _ = play(tables, run, keep="best", patience=2, resume=True)
    assert (got["selection"]["round"], replay_journal(run)[0].kept_round) == (2, 2)
    check_results(run)


def test_a_damaged_adapter_is_written_again_from_the_state_that_is_kept(tables: Tables, tmp_path: Path) -> None:
    run = tmp_path / "run"
    play(tables, run, keep="best", patience=2)
    before = peft.digest(run / "adapter")
    (run / "adapter" / "adapter_model.safetensors").write_bytes(b"")
    play(tables, run, keep="best", patience=2, resume=True)
    assert peft.digest(run / "adapter") == before


def test_either_round_can_be_exported(tables: Tables, tmp_path: Path) -> None:
    best, last = tmp_path / "best", tmp_path / "last"
    play(tables, best, keep="best", patience=2)
    play(tables, last, patience=2)
    for run in (best, last):
        export(run, round="last", out=tmp_path / f"{run.name}-last")
    assert peft.digest(tmp_path / "best-last") == peft.digest(tmp_path / "last-last") == peft.digest(last / "adapter")
    assert json.loads((tmp_path / "best-last" / "fedtune.json").read_text())["round"] == 4
    assert peft.digest(export(best, round="best", out=tmp_path / "best-best")) == peft.digest(best / "adapter")
    with pytest.raises(ConfigError, match=r"got round 2, whose state was not kept; .*rounds.keep = \"best\""):
        export(last, round="best", out=tmp_path / "none")
    with pytest.raises(ConfigError, match="one of best, last; got 'first'"):
        export(last, round="first", out=tmp_path / "none")


def test_a_recipe_without_rows_to_compare_rounds_by_is_refused(tables: Tables) -> None:
    without = tables | {"rounds": {"count": 2, "keep": "best"}, "data": {**tables["data"], "held_out": 0.0}}
    without["data"].pop("test", None)
    with pytest.raises(ConfigError, match="test data, or rows that clients hold out"):
        prepare(bind(without))
    assert isinstance(prepare(bind(without | {"rounds": {"count": 2}})), Experiment)
