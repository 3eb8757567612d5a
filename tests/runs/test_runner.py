from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fedtune.config import bind
from fedtune.errors import StoreError
from fedtune.methods.method import GlobalModel
from fedtune.report.reader import read_run
from fedtune.rounds.events import Event, Note, RoundFinished
from fedtune.runs import local
from fedtune.runs import runner as conducting
from fedtune.runs.local import Experiment, prepare
from fedtune.runs.resume import check_resumable
from fedtune.runs.summary import summary
from fedtune.store import peft
from fedtune.store.round_records import read_rounds
from fedtune.store.run_directory import write_recipe
from tests.runs.conftest import read_lines, read_summary, run_prepared, same_ends, stopped_in

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.parametrize(("every", "scored"), [(0, [0, 3]), (2, [0, 2, 3]), (1, [0, 1, 2, 3])])
def test_the_test_data_are_scored_as_often_as_asked_and_at_both_ends(
    every: int, scored: list[int], tables: dict[str, Any], run: Path
) -> None:
    tables["evaluate"] |= {"every": every}
    tables["rounds"] = {"count": 3}
    summary = run_prepared(prepare(bind(tables)), run)
    assert [line["round"] for line in read_lines(run) if line["test"] is not None] == scored
    assert [line["round"] for line in read_lines(run) if line["held_out"]] == [0, 3]
    assert summary["after"]["test"] == read_lines(run)[-1]["test"]


def test_a_round_is_reported_only_once_it_is_on_the_disk(prepared: Experiment, run: Path) -> None:
    written = []

    def watch(event: Event) -> None:
        if isinstance(event, RoundFinished):
            at = json.loads((run / "adapter" / "fedtune.json").read_text())["round"] if event.record.round else None
            written.append((event.record.round, len(read_lines(run)), at))

    run_prepared(prepared, run, watch)
    assert written == [(0, 1, None), (1, 2, 1), (2, 3, 2)]


def test_the_time_of_a_run_includes_the_answers_at_its_end(prepared: Experiment, run: Path) -> None:
    run_prepared(prepared, run)
    order: list[str] = []

    def answer(tuned: GlobalModel) -> dict[str, Any]:
        order.append("answered")
        return {"sample": None}

    def elapsed() -> float:
        order.append("asked for the time")
        return 7.0

    context = replace(local.run_context(prepared), sample=answer)
    content = summary(context, run, read_rounds(run), reason="", elapsed=elapsed)
    assert content["seconds"] == 7.0
    assert order == ["answered", "asked for the time"]


def test_the_summary_adds_up(prepared: Experiment, run: Path) -> None:
    summary = run_prepared(prepared, run)
    # hidden 32, four heads and two for keys and values: q_proj is 32 x 32, v_proj 16 x 32; two layers, rank 8
    assert summary["trainable"] == 8 * 2 * ((32 + 32) + (16 + 32))
    assert summary["bytes_up"] == sum(client["bytes_up"] for client in summary["clients"].values())
    _, _, origin = peft.read(run / "adapter")
    assert origin["bytes_up"] == summary["bytes_up"]
    assert origin["clients"]["client-2"] == {"examples": 6, "rank": 8}
    assert summary["adapter_digest"] == peft.digest(run / "adapter")


@pytest.mark.parametrize("round", [1, 2])
def test_ctrl_c_in_the_middle_of_a_round_leaves_what_can_be_read(
    round: int, prepared: Experiment, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "perform", stopped_in(round, KeyboardInterrupt()))
    events: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        run_prepared(prepared, run, events.append)
    left = read_run(run)
    assert (left.state, [each.round for each in left.rounds]) == ("interrupted", list(range(round)))
    assert (read_summary(run)["reason"], read_summary(run)["rounds"]) == ("Ctrl-C", round - 1)
    assert (run / "adapter").exists() is (round == 2)
    assert isinstance(events[-1], Note)
    assert f"stopped after round {round - 1}" in events[-1].text


def test_a_full_disk_is_reported_even_if_the_summary_no_longer_fits(
    prepared: Experiment, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise StoreError(f"{arguments[0].name}: full")

    monkeypatch.setattr(peft, "write", full)
    monkeypatch.setattr(conducting, "write_summary", full)
    with pytest.raises(StoreError, match="adapter: full"):
        run_prepared(prepared, run)
    assert [line["round"] for line in read_lines(run)] == [0]
    assert not (run / "summary.json").exists()


@pytest.mark.parametrize("round", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    round: int, prepared: Experiment, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tmp_path / "whole", "")
    run_prepared(prepared, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(local, "perform", stopped_in(round, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            run_prepared(prepared, run)
    summary = run_prepared(prepared, run, resume=True)
    assert same_ends(run, tmp_path / "whole")
    assert (summary["state"], summary["rounds"]) == ("finished", 2)
    assert summary["bytes_up"] == read_summary(tmp_path / "whole")["bytes_up"]


def test_a_run_beside_its_writer_is_left_alone(prepared: Experiment, run: Path) -> None:
    longer = replace(prepared, recipe=replace(prepared.recipe, rounds=replace(prepared.recipe.rounds, count=9)))

    def watch(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.record.round == 1:
            before = (run / "recipe.toml").read_text()
            with pytest.raises(StoreError, match="no other process writes it"):
                run_prepared(longer, run, resume=True)
            assert (run / "recipe.toml").read_text() == before

    run_prepared(prepared, run, watch)


def test_a_run_killed_before_anything_was_noted_starts(prepared: Experiment, run: Path) -> None:
    check_resumable(run, replace(prepared.recipe, seed=7))
    assert run_prepared(prepared, run, resume=True)["rounds"] == 2
