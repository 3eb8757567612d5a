from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import fedtune
from fedtune.api import evaluate
from fedtune.client.batched import LARGEST
from fedtune.config import bind, render
from fedtune.data.federation import digest
from fedtune.errors import ConfigError
from fedtune.messages import Client, PlannedClient
from fedtune.methods.method import GlobalModel
from fedtune.runs.local import Experiment, apart_notes, batched_clients, prepare, score

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def prepared(tables: dict[str, Any]) -> Experiment:
    return prepare(bind(tables))


def test_the_fleet_counts_training_examples_only(prepared: Experiment) -> None:
    assert prepared.fleet == {"client-0": 6, "client-1": 6, "client-2": 6}  # of 8 rows each a quarter is held out
    plans = prepared.planner.plan(None, 1, [Client(name, 6) for name in prepared.fleet])
    ranks = {name: each.plan.rank for name, each in plans.items() if isinstance(each, PlannedClient)}
    assert ranks == {"client-0": 4, "client-1": 2, "client-2": 8}


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [("auto", "cpu", 1), ("auto", "mps", 1), ("auto", "cuda", LARGEST), (3, "cpu", 3)],
)
def test_clients_train_at_once_by_themselves_on_a_gpu_alone(setting: Any, device: str, expected: int) -> None:
    assert batched_clients(setting, device) == expected


def test_a_gpu_that_clients_have_in_turn_is_said_once_with_the_reason(tables: dict[str, Any]) -> None:
    dropout = bind(tables, overrides=["client.dropout=0.1"])
    [note] = apart_notes(dropout, "cuda", saved=["score"])
    why = "because of client.dropout (0.1); score, trained in full"
    assert note == f"engine.batch_clients: clients train one after the other, {why}"
    assert apart_notes(bind(tables), "cuda", saved=[]) == []
    assert apart_notes(dropout, "cpu", saved=[]) == []
    assert apart_notes(bind(tables, overrides=["engine.batch_clients=1", "client.dropout=0.1"]), "cuda", saved=[]) == []


def test_a_run_whose_clients_train_at_once_learns_what_it_learns_without(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    shorter = {**tables, "evaluate": {"every": 0, "clients": False}, "override": [{"clients": ["client-1"], "rank": 2}]}
    shorter["method"] = {"name": "flora", "wire_dtype": "fp32"}  # rounding to codes hides most last bits
    plain = fedtune.simulate(shorter, out=tmp_path / "plain")
    batched = fedtune.simulate(shorter, overrides=["engine.batch_clients=8"], out=tmp_path / "batched")
    ours, theirs = (load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (batched, plain))
    assert ours.keys() == theirs.keys()
    assert any((ours[name] != theirs[name]).any() for name in ours)  # other sums, so other bits
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0.01, atol=2e-3)


@pytest.mark.slow
def test_a_run_whose_clients_are_divided_among_processes_learns_what_it_learns_in_one(
    tables: dict[str, Any], tmp_path: Path
) -> None:
    shorter = {**tables, "evaluate": {"every": 0, "clients": False}}
    plain = fedtune.simulate(shorter, out=tmp_path / "plain")
    shared = fedtune.simulate(shorter, overrides=["model.processes=2"], out=tmp_path / "shared")
    ours, theirs = (load_file(run.path / "adapter" / "adapter_model.safetensors") for run in (shared, plain))
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0.01, atol=2e-3)


def test_scores_are_made_of_what_is_asked_for(prepared: Experiment) -> None:
    evaluate = replace(prepared.recipe.evaluate, examples=2, client_examples=1)
    prepared = replace(prepared, recipe=replace(prepared.recipe, evaluate=evaluate))
    on_test = score(prepared, GlobalModel(), test=True, clients=False)
    assert on_test.test is not None
    assert (on_test.test["examples"], on_test.held_out) == (2, {})
    on_clients = score(prepared, GlobalModel(), test=False, clients=True)
    assert on_clients.test is None
    assert {name: held["examples"] for name, held in on_clients.held_out.items()} == dict.fromkeys(prepared.fleet, 1)


def test_a_client_that_nobody_knew_gets_the_recipes_plan(prepared: Experiment) -> None:
    plans = prepared.planner.plan(None, 1, [Client("client-2", 10), Client("new", 10)])
    assert [each.plan.rank for each in plans.values() if isinstance(each, PlannedClient)] == [8, 4]


class Day:
    """Stands in the place of `datetime.date`."""

    def __init__(self, text: str) -> None:
        self.text = text

    def today(self) -> Day:
        return self

    def isoformat(self) -> str:
        return self.text


@pytest.fixture
def dated(tables: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """A recipe over a base whose chat template writes the day."""
    shutil.copytree(checkpoints["llama"], tmp_path / "base")
    template = "the {{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    (tmp_path / "base" / "chat_template.jinja").write_text(template)
    rows = [{"instruction": f"the fox {i}", "output": "jumps over", "who": f"c{i % 2}"} for i in range(8)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"source": str(tmp_path / "x.jsonl"), "max_tokens": 64, "split": {"kind": "key", "by": "who"}}
    rest = {**tables, "override": [], "rounds": {"count": 1}, "evaluate": {"every": 0, "clients": False}}
    return {**rest, "data": data, "model": {**tables["model"], "base": str(tmp_path / "base")}}


def on(monkeypatch: pytest.MonkeyPatch, day: str) -> None:
    monkeypatch.setattr("fedtune.runs.local.date", Day(day))


def test_a_template_that_writes_the_day_gets_that_of_the_start(
    dated: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    on(monkeypatch, "2026-11-29")
    first = prepare(bind(dated))
    assert first.recipe.data.date == "2026-11-29"
    on(monkeypatch, "2026-11-30")
    assert digest(prepare(bind(render(first.recipe))).federation) == digest(first.federation)
    assert digest(prepare(bind(dated)).federation) != digest(first.federation)
    plain = prepare(bind(dated, overrides=["data.template=plain"]))
    assert plain.recipe.data.date is None


def test_a_run_goes_on_on_another_day(dated: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on(monkeypatch, "2026-11-29")
    run = fedtune.simulate(dated, out=tmp_path / "run")
    before = evaluate(run.path)
    on(monkeypatch, "2026-12-24")
    assert evaluate(run.path) == before
    longer = fedtune.simulate({**dated, "rounds": {"count": 2}}, resume=run.path)
    assert longer.summary["rounds"] == 2
    assert fedtune.bind(run.path / "recipe.toml").data.date == "2026-11-29"
    with pytest.raises(ConfigError, match=r'data\.date: "2026-11-29" -> "2026-12-24"'):
        fedtune.simulate({**dated, "data": {**dated["data"], "date": "2026-12-24"}}, resume=run.path)
