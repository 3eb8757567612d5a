"""Runs whose clients have models of their own: the same on every engine, and after a stop at any place."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fedtune
from fedtune.api import Run
from fedtune.config import bind
from fedtune.errors import ConfigError
from fedtune.runs import local
from fedtune.runs.local import prepare
from tests.runs.conftest import read_lines, same_ends, stopped_in

Tables = dict[str, Any]
KINDS: Mapping[str, Mapping[str, Any]] = {
    "ditto": {"kind": "ditto", "steps": 2},
    "pfedme": {"kind": "pfedme", "steps": 2, "rate": 0.01},
    "fedrep": {"kind": "fedrep", "keep": ["*q_proj.b"]},
    "share-a": {"kind": "share-a"},
    "fedbn": {"kind": "fedbn"},
}


def with_personal(tables: Tables, **personal: Any) -> Tables:
    return {
        **tables,
        "method": {"name": "zeropad"},
        "adapter": {**tables["adapter"], "modules_to_save": ["input_layernorm"]},
        "evaluate": {"batch": 8},
        **({"personal": personal} if personal else {}),
    }


def states(run: Path) -> Mapping[str, bytes]:
    """Return the personal states of all clients, by their place below the run directory."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted((run / "personal").rglob("*.safetensors"))}


def simulate(tables: Tables, out: Path, **engine: Any) -> Run:
    return fedtune.simulate({**tables, **({"engine": engine} if engine else {})}, out=out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("engine", [{"name": "processes", "workers": 2}, {"name": "ray", "workers": 1}])
def test_every_engine_stores_the_same_states(kind: str, engine: Any, tables: Tables, tmp_path: Path) -> None:
    recipe = with_personal(tables, **KINDS[kind])
    one, two = simulate(recipe, tmp_path / "one"), simulate(recipe, tmp_path / "two", **engine)
    assert one.summary["failures"] == []
    assert same_ends(one.path, two.path)
    assert len(states(one.path)) == 6  # of three clients the last two rounds
    assert states(one.path) == states(two.path)


@pytest.mark.parametrize("kind", ["ditto", pytest.param("share-a", marks=pytest.mark.slow)])
def test_a_run_that_was_stopped_in_a_round_ends_with_the_same_states(
    kind: str, tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_personal({**tables, "rounds": {"count": 3}}, **KINDS[kind])
    whole = simulate(recipe, tmp_path / "whole")
    asked = list[str]()

    def stopped(base: Any, examples: Any, order: Any, **options: Any) -> Any:
        update = stopped_in(0, KeyboardInterrupt())(base, examples, order, **options)
        asked.append(order.plan.client)
        if len(asked) == 5:  # the second of round 2: its state is on the disk, and its update is not
            raise KeyboardInterrupt
        return update

    with monkeypatch.context() as patch:
        patch.setattr(local, "perform", stopped)
        with pytest.raises(KeyboardInterrupt):
            simulate(recipe, tmp_path / "cut")
    resumed = fedtune.simulate(resume=tmp_path / "cut")
    assert same_ends(whole.path, resumed.path)
    assert states(whole.path) == states(resumed.path)


def test_the_global_model_beside_ditto_is_that_of_the_plain_method(tables: Tables, tmp_path: Path) -> None:
    plain = simulate(with_personal(tables), tmp_path / "plain")
    ditto = simulate(with_personal(tables, **KINDS["ditto"]), tmp_path / "ditto")
    assert [line["state_digest"] for line in read_lines(plain.path)] == [
        line["state_digest"] for line in read_lines(ditto.path)
    ]
    assert not states(plain.path)


def test_what_stays_costs_no_bytes(tables: Tables, tmp_path: Path) -> None:
    plain = simulate(with_personal(tables), tmp_path / "plain")
    shared = simulate(with_personal(tables, kind="share-a"), tmp_path / "shared")
    assert shared.summary["bytes_up"] < 0.75 * plain.summary["bytes_up"]
    assert shared.summary["bytes_down"] < 0.75 * plain.summary["bytes_down"]


def test_a_client_that_has_lost_its_state_starts_from_the_server_s_and_is_named(
    tables: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    recipe = with_personal({**tables, "rounds": {"count": 2}}, **KINDS["ditto"])
    with monkeypatch.context() as patch:
        patch.setattr(local, "perform", stopped_in(2, KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            simulate(recipe, run)
    shutil.rmtree(run / "personal")
    notes = list[str]()
    fedtune.simulate(resume=run, watch=lambda event: notes.append(getattr(event, "text", "")))
    [note] = [text for text in notes if "personal" in text and "client-0" in text]
    assert "client-0, client-1, client-2 started from the server's values" in note
    traces = [line["clients"]["client-0"]["personal"] for line in read_lines(run)[1:]]
    assert [trace["before"] for trace in traces] == ["", ""]
    assert all(len(trace["after"]) == 16 for trace in traces)


@pytest.mark.parametrize(
    ("personal", "text"),
    [
        ({"kind": "fedrep", "keep": ["*nothing*"]}, "personal.keep: expected globs over what is trained (model.layers"),
        ({"kind": "fedrep", "keep": ["*"]}, "personal.keep: expected globs that leave something to average"),
    ],
)
def test_globs_that_name_nothing_or_all_are_refused_before_training(personal: Any, text: str, tables: Tables) -> None:
    with pytest.raises(ConfigError) as error:
        prepare(bind(with_personal(tables, **personal)))
    assert text in str(error.value)


def test_norms_must_be_trained_to_stay(tables: Tables) -> None:
    recipe = with_personal(tables, kind="fedbn")
    recipe["adapter"] = tables["adapter"]
    with pytest.raises(ConfigError, match=r"name the norms in adapter\.modules_to_save"):
        prepare(bind(recipe))


@pytest.mark.parametrize("personal", [{"kind": "finetune"}, {"kind": "ditto"}])
def test_own_models_that_nothing_would_score_are_refused_before_training(personal: Any, tables: Tables) -> None:
    recipe = with_personal(tables, **personal)
    recipe["data"] = {**recipe["data"], "held_out": 0.0}
    with pytest.raises(ConfigError, match=r"data\.held_out: expected a share above 0 beside \[personal\]"):
        prepare(bind(recipe))
