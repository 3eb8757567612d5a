from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import fedtune
from fedtune import api
from fedtune.config import bind
from fedtune.errors import ConfigError
from fedtune.lora.adapter import delta
from fedtune.methods import METHODS
from fedtune.runs.local import prepare
from fedtune.runs.start import start_state
from fedtune.store import manifest
from fedtune.store.peft_import import read_adapter
from tests.store.test_peft_import import foreign

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

MIXED: dict[str, Any] = {
    "r": 3,
    "lora_alpha": 5,
    "target_modules": ["q_proj"],
    "rank_pattern": {"layers.1.self_attn.q_proj": 7},
}


def silent(tables: dict[str, Any], out: Path, **options: Any) -> api.Run:
    return fedtune.simulate(tables, out=out, watch=lambda event: None, **options)


def starting(tables: dict[str, Any], start: Path, **parts: Any) -> dict[str, Any]:
    return {**tables, "adapter": {**tables["adapter"], "start": str(start)}, "rounds": {"count": 1}, **parts}


@pytest.fixture
def stranger(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """An adapter of stock peft of two ranks, over some of the recipe's targets."""
    foreign(checkpoints["llama"], tmp_path / "stranger", **MIXED)
    return tmp_path / "stranger"


def test_flora_starts_exactly_where_the_adapter_is(tables: dict[str, Any], stranger: Path) -> None:
    recipe = bind(starting(tables, stranger))
    experiment = prepare(recipe)
    model = METHODS["flora"].global_model(start_state(recipe, experiment.blueprint))
    read = read_adapter(stranger).adapter
    assert model.adapter.keys() == read.keys()  # of the other targets the change is zero
    for name, factors in read.items():
        np.testing.assert_allclose(delta(model.adapter[name]), delta(factors), atol=1e-6)


def test_a_run_goes_on_from_another_runs_adapter(tables: dict[str, Any], tmp_path: Path, ran: api.Run) -> None:
    run = silent(starting(tables, ran.path), tmp_path / "next")
    before, after = run.summary["before"]["test"]["loss"], run.summary["after"]["test"]["loss"]
    assert before == pytest.approx(ran.summary["after"]["test"]["loss"], abs=1e-5)
    assert after < before
    shutil.rmtree(ran.path)  # what it started from is in its own states
    scores = fedtune.evaluate(run.path)
    assert scores["after"]["loss"] == pytest.approx(after, abs=1e-5)
    assert scores["before"]["loss"] == pytest.approx(ran.summary["before"]["test"]["loss"], abs=1e-5)  # of the base


def test_a_resumed_run_is_the_uninterrupted_one(tables: dict[str, Any], tmp_path: Path, stranger: Path) -> None:
    whole = silent(starting(tables, stranger, rounds={"count": 2}), tmp_path / "whole")
    silent(starting(tables, stranger), tmp_path / "part")
    resumed = fedtune.simulate(resume=tmp_path / "part", overrides=["rounds.count=2"], watch=lambda event: None)
    assert resumed.summary["state_digest"] == whole.summary["state_digest"]
    assert api.verify(tmp_path / "part").committed == 2


def test_another_adapter_at_the_same_place_is_refused(
    tables: dict[str, Any], tmp_path: Path, stranger: Path, checkpoints: dict[str, Path]
) -> None:
    silent(starting(tables, stranger), tmp_path / "run")
    foreign(checkpoints["llama"], stranger, seed=1, **MIXED)
    with pytest.raises(ConfigError, match=r"adapter\.start: expected what the run was started with"):
        fedtune.simulate(resume=tmp_path / "run", overrides=["rounds.count=2"], watch=lambda event: None)


@pytest.mark.parametrize("optimizer", ["none", "fedadam"])
def test_fedit_takes_up_to_its_own_rank(
    optimizer: str, tables: dict[str, Any], tmp_path: Path, stranger: Path, checkpoints: dict[str, Path]
) -> None:
    method = {"name": "fedit", "server_optimizer": optimizer, "server_learning_rate": 0.01}
    tables |= {"method": method if optimizer != "none" else {"name": "fedit"}, "override": []}
    with pytest.raises(ConfigError, match=r"adapter\.start: expected at most rank 4 in every module.*method = 'flora'"):
        silent(starting(tables, stranger), tmp_path / "run")
    assert not list((tmp_path / "run").glob("*"))
    foreign(checkpoints["llama"], tmp_path / "equal", r=4, lora_alpha=4, target_modules=["q_proj"])
    run = silent(starting(tables, tmp_path / "equal"), tmp_path / "run")
    assert run.summary["state"] == "finished"
    base = silent({**tables, "rounds": {"count": 1}}, tmp_path / "base")
    assert run.summary["before"]["test"]["loss"] != base.summary["before"]["test"]["loss"]


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.start is None])
def test_methods_without_such_a_state_are_refused_by_name(method: str, tables: dict[str, Any], stranger: Path) -> None:
    with pytest.raises(ConfigError, match=rf"adapter\.start: expected none with method = '{method}'"):
        bind({**starting(tables, stranger), "method": {"name": method}, "override": []})


def test_an_adapter_that_does_not_fit_is_refused_before_anything_is_written(
    tables: dict[str, Any], tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    foreign(checkpoints["llama"], tmp_path / "wide", r=2, lora_alpha=2, target_modules=["up_proj"])
    with pytest.raises(ConfigError, match=r"adapter\.start: expected layers that adapter\.targets names; got model"):
        silent(starting(tables, tmp_path / "wide"), tmp_path / "run")
    foreign(checkpoints["llama"], tmp_path / "broken", r=2, lora_alpha=2, target_modules=["q_proj"])
    weights = load_file(tmp_path / "broken" / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] = np.nan
    save_file(weights, tmp_path / "broken" / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=r"adapter\.start: expected finite numbers in .*q_proj.*; got 1 that are not"):
        silent(starting(tables, tmp_path / "broken"), tmp_path / "run")
    with pytest.raises(ConfigError, match="a PEFT adapter"):
        silent(starting(tables, tmp_path / "none"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_another_base_is_refused(
    tables: dict[str, Any], tmp_path: Path, ran: api.Run, checkpoints: dict[str, Path]
) -> None:
    facts = manifest.open_folder(ran.adapter).facts
    manifest.write(ran.adapter, {**facts, "base": {**facts["base"], "digest": "0" * 64}})
    with pytest.raises(ConfigError, match=r"adapter\.start: expected an adapter of the base that is loaded"):
        silent(starting(tables, ran.path), tmp_path / "next")
