from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from fedtune import experiment
from fedtune.client import perform
from fedtune.config import bind
from fedtune.errors import ConfigError, StoreError
from fedtune.experiment import Experiment, check_ranks, conduct, prepare, score
from fedtune.model.base import Base
from fedtune.report.records import read_run
from fedtune.rounds import Event, Note, RoundFinished
from fedtune.store import peft
from fedtune.store.run import write_recipe

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def prepared(tables: dict[str, Any]) -> Experiment:
    return prepare(bind(tables))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write_recipe(folder, "name = 'tiny'")
    return folder


def lines(run: Path) -> list[Mapping[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def told(run: Path) -> Mapping[str, Any]:
    summary: Mapping[str, Any] = json.loads((run / "summary.json").read_text())
    return summary


def stopped_in(round: int, error: BaseException) -> Callable[..., Any]:
    def tired(base: Any, examples: Any, assignment: Any) -> Any:
        if assignment.round == round:
            raise error
        return perform(base, examples, assignment)

    return tired


def test_the_fleet_counts_training_examples_only(prepared: Experiment) -> None:
    assert prepared.fleet == {"client-0": 6, "client-1": 6, "client-2": 6}  # of 8 rows each a quarter is held out
    assert prepared.planner.ranks == {"client-0": 4, "client-1": 2, "client-2": 8}


def test_a_rank_may_reach_the_smaller_side_of_the_smallest_layer_and_no_more() -> None:
    base = cast(Base, SimpleNamespace(modules={"wide": (64, 32), "narrow": (8, 128)}))
    check_ranks({"a": 8, "b": 2}, base)
    with pytest.raises(ConfigError, match=r"at most 8, the smaller side of narrow \(8, 128\); got 9 for b"):
        check_ranks({"a": 8, "b": 9}, base)


def test_scores_are_made_of_what_is_asked_for(prepared: Experiment) -> None:
    evaluate = replace(prepared.recipe.evaluate, examples=2, client_examples=1)
    prepared = replace(prepared, recipe=replace(prepared.recipe, evaluate=evaluate))
    on_test = score(prepared, {}, {}, test=True, clients=False)
    assert on_test.test is not None
    assert (on_test.test["examples"], on_test.held_out) == (2, {})
    on_clients = score(prepared, {}, {}, test=False, clients=True)
    assert on_clients.test is None
    assert {name: held["examples"] for name, held in on_clients.held_out.items()} == dict.fromkeys(prepared.fleet, 1)


@pytest.mark.parametrize(("every", "scored"), [(0, [0, 3]), (2, [0, 2, 3]), (1, [0, 1, 2, 3])])
def test_the_test_data_are_scored_as_often_as_asked_and_at_both_ends(
    every: int, scored: list[int], tables: dict[str, Any], run: Path
) -> None:
    tables["evaluate"] |= {"every": every}
    tables["rounds"] = {"count": 3}
    summary = conduct(prepare(bind(tables)), run, lambda event: None)
    assert [line["round"] for line in lines(run) if line["test"] is not None] == scored
    assert [line["round"] for line in lines(run) if line["held_out"]] == [0, 3]
    assert summary["after"]["test"] == lines(run)[-1]["test"]


def test_a_round_is_told_only_once_it_is_on_the_disk(prepared: Experiment, run: Path) -> None:
    written = []

    def watch(event: Event) -> None:
        if isinstance(event, RoundFinished):
            at = json.loads((run / "adapter" / "fedtune.json").read_text())["round"] if event.record["round"] else None
            written.append((event.record["round"], len(lines(run)), at))

    conduct(prepared, run, watch)
    assert written == [(0, 1, None), (1, 2, 1), (2, 3, 2)]


def test_the_summary_adds_up(prepared: Experiment, run: Path) -> None:
    summary = conduct(prepared, run, lambda event: None)
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
    monkeypatch.setattr(experiment, "perform", stopped_in(round, KeyboardInterrupt()))
    events: list[Event] = []
    with pytest.raises(KeyboardInterrupt):
        conduct(prepared, run, events.append)
    left = read_run(run)
    assert (left.state, [each.round for each in left.rounds]) == ("interrupted", list(range(round)))
    assert (told(run)["reason"], told(run)["rounds"]) == ("Ctrl-C", round - 1)
    assert (run / "adapter").exists() is (round == 2)
    assert isinstance(events[-1], Note)
    assert f"stopped after round {round - 1}" in events[-1].text


def test_a_full_disk_is_told_even_if_the_summary_no_longer_fits(
    prepared: Experiment, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> None:
        raise StoreError(f"{arguments[0].name}: full")

    monkeypatch.setattr(peft, "write", full)
    monkeypatch.setattr(experiment, "write_summary", full)
    with pytest.raises(StoreError, match="adapter: full"):
        conduct(prepared, run, lambda event: None)
    assert [line["round"] for line in lines(run)] == [0]
    assert not (run / "summary.json").exists()
