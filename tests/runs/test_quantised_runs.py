"""Whole runs over quantised bases: the same bits on every engine, scored over codes and exported into weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedtune
from fedtune import api
from fedtune.config import bind
from fedtune.errors import ConfigError
from fedtune.lora.adapter import Factors
from fedtune.model.lora import with_adapters
from fedtune.model.merge import merge
from fedtune.planning.policy import Arm
from fedtune.runs.chat import open_speaker
from fedtune.runs.local import prepare
from fedtune.store import peft
from tests.conftest import Simulated, base_of, kseed
from tests.runs.test_chat import said
from tests.test_engines import Engine, chosen, in_memory_grid, played

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def over(tables: dict[str, Any], dtype: str) -> dict[str, Any]:
    return tables | {"model": tables["model"] | {"dtype": dtype}}


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(in_memory_grid, id="grid"),
        pytest.param(chosen("processes", 2), id="two processes", marks=pytest.mark.slow),
    ],
)
def test_rounds_over_codes_are_those_in_process_bit_for_bit(engine: Engine, tables: dict[str, Any]) -> None:
    prepared = [prepare(bind(over(tables | {"rounds": {"count": 1}}, "nf4")))]
    assert played(prepared, engine) == played(prepared, chosen("inprocess", 1))


@pytest.mark.slow
@pytest.mark.parametrize("engine", [in_memory_grid, chosen("processes", 2)], ids=["grid", "two processes"])
def test_seeds_over_codes_are_those_in_process_bit_for_bit(engine: Engine, tables: dict[str, Any]) -> None:
    kron = kseed(tables, "kron") | {"adapter": tables["adapter"], "rounds": {"count": 2}}
    prepared = [prepare(bind(over(kron, "int8")))]
    assert played(prepared, engine) == played(prepared, chosen("inprocess", 1))


def test_a_run_over_codes_is_scored_over_them_and_merged_into_the_weights(
    tables: dict[str, Any], tmp_path: Path, simulated: Simulated
) -> None:
    run = simulated(over(tables, "nf4"), tmp_path / "run")
    base = prepare(bind(tables)).base
    assert run.summary["base"]["digest"] == base.digest
    assert run.summary["base"]["parameters"] == base.num_parameters
    scores = fedtune.evaluate(run.path)
    assert scores["after"]["loss"] == pytest.approx(run.summary["after"]["test"]["loss"], abs=1e-6)
    assert said(open_speaker(run.path), "the quick") == run.summary["sample"]["after"]
    merged = load_file(fedtune.export(run.path, form="merged") / "model.safetensors")
    # The adapter as it is, added once in float32 to the checkpoint's own weights.
    adapter, saved, _ = peft.read(run.adapter)
    merge(base, adapter, saved, dtype="float32", revision=None, out=tmp_path / "expected")
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


def test_an_export_names_the_checkpoint_that_it_needs(
    tables: dict[str, Any], tmp_path: Path, simulated: Simulated
) -> None:
    run = simulated(over(tables, "nf4"), tmp_path / "run")
    recipe = run.path / "recipe.toml"
    recipe.write_text(recipe.read_text().replace(base_of(run), str(tmp_path / "gone")))
    with pytest.raises(ConfigError, match=r"model\.base: expected .*gone"):
        fedtune.export(run.path, form="merged")


@pytest.mark.slow
def test_seeds_over_codes_move_the_weights_that_the_codes_are_of(
    tables: dict[str, Any], tmp_path: Path, simulated: Simulated
) -> None:
    run = simulated(over(kseed(tables, "kron"), "nf4"), tmp_path / "run")
    scores = fedtune.evaluate(run.path)
    assert scores["after"]["loss"] == pytest.approx(run.summary["after"]["test"]["loss"], abs=1e-6)
    assert said(open_speaker(run.path), "the quick") == run.summary["sample"]["after"]
    merged = fedtune.export(run.path, form="merged")
    weights = json.loads((merged / "fedtune.json").read_text())["weights"]
    assert fedtune.replay(base_of(run), run.adapter).weights == weights
    api.verify(run.path)
    own, moved = load_file(Path(base_of(run)) / "model.safetensors"), load_file(merged / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    assert 0 < float((own[name] - moved[name]).abs().max()) < 0.1


def test_a_hundred_rounds_of_tiny_changes_are_served_as_they_were_summed(tables: dict[str, Any]) -> None:
    """Merged into codes they would vanish: each is a thousandth of what separates two of them."""
    base = prepare(bind(over(tables, "nf4"))).base
    name = next(iter(base.modules))
    (m, n), rng = base.modules[name], np.random.default_rng(0)
    changes = [1e-4 * np.outer(rng.standard_normal(m), rng.standard_normal(n)).astype(np.float32) for _ in range(100)]
    summed = np.sum(np.asarray(changes, np.float64), 0)
    u, s, vt = np.linalg.svd(summed)
    factors = Factors(a=vt.astype(np.float32), b=(u * s).astype(np.float32))
    x = torch.eye(n)
    with torch.no_grad():
        before = base.model.get_submodule(name)(x)
        with with_adapters(base, frozen={name: factors}) as model:
            served = (model.get_submodule(name)(x) - before).T.numpy()
    # As a matrix of its own it is rounded to bfloat16, relative to the change and not to the weight.
    assert np.abs(served - summed).max() < 4e-3 * np.abs(summed).max()


def test_the_bill_of_a_recipe_over_codes_counts_codes(tables: dict[str, Any]) -> None:
    """As that of plans that name the format; and not both the codes and the weights that they are of."""
    arm, training = Arm(0.0, 4), bind(tables).client
    whole, coded = (prepare(bind(over(tables, dtype))).devices for dtype in ("float32", "nf4"))
    weights = [devices.memory("client-1", arm, training).weights for devices in (whole, coded)]
    assert weights[1] < 0.9 * weights[0]
    assert coded.cost_by_format("client-1", arm, training, "").memory_parts["weights"] == pytest.approx(
        coded.cost_by_format("client-1", arm, training, "nf4").memory_parts["weights"]
    )
    assert coded.footprint("client-1", arm, training).base_dtype == "nf4"
