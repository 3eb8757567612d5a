"""A bundle is what torch computes, or it is not there: no folder, no signature."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.client.site import blocks
from fedtune.edge.bundle import read_bundle
from fedtune.edge.onnx_runtime import load
from fedtune.errors import ConfigError, StoreError
from fedtune.link.provenance import load_roster
from fedtune.model import onnx_graph, onnx_weights
from fedtune.model.base import Base
from fedtune.model.onnx_reference import in_float32
from fedtune.probing.rows import PaddedRows
from fedtune.rounds.events import Phase
from fedtune.runs import edge_bundle
from fedtune.runs.edge_bundle import export_bundle, read_source, rounded_axes, write_bundle
from tests.conftest import kseed
from tests.edge.tiny_models import tiny_base
from tests.link.ceremony import enroll_parties

NOW = int(time.time())


@pytest.fixture(scope="module")
def parties(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    return enroll_parties(tmp_path_factory.mktemp("sites"), now=NOW)


def test_a_model_becomes_a_signed_bundle(
    checkpoints: dict[str, Path], parties: Mapping[str, Path], tmp_path: Path
) -> None:
    seen: list[Any] = []
    out = tmp_path / "bundle"
    written = export_bundle(checkpoints["llama"], out, identity=parties["server"], watch=seen.append)
    roster = load_roster(parties["server"] / "roster", None)[0]
    bundle = read_bundle(out, roster, now=int(time.time()))
    assert (bundle.signer, written.signer) == ("server", "server")
    assert bundle.base_name == checkpoints["llama"].name  # not where it lies
    assert str(checkpoints["llama"].parent) not in (out / "fedtune.json").read_text()
    assert (bundle.facts.family, bundle.facts.positions, bundle.facts.eos_ids, bundle.facts.bos_id) == (
        "llama", 128, (2,), 1,
    )  # fmt: skip
    assert bundle.facts.anatomy == blocks(edge_bundle.load_base(read_source(checkpoints["llama"])))
    assert bundle.facts.anatomy is not None
    assert written.difference < 1e-5
    assert sum(written.sizes.values()) == sum(file.stat().st_size for file in out.iterdir())
    assert [type(event) for event in seen] == [Phase] * 3
    assert (out / "tokenizer.json").is_file()


def test_the_base_of_a_recipe_is_the_one_that_its_sites_hold(
    tables: dict[str, Any], tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    import json

    from fedtune.config import bind
    from fedtune.config.render import render

    recipe = tmp_path / "recipe.toml"
    table = {**kseed(tables, "kron"), "adapter": {"targets": ["q_proj", "down_proj"]}}
    table["model"] = {**table["model"], "dtype": "bfloat16"}
    recipe.write_text(render(bind(table)))
    write = export_bundle(recipe, tmp_path / "bundle")
    bundle = read_bundle(tmp_path / "bundle")
    assert {entry.dtype for entry in bundle.manifest.entries} == {"bf16"}
    assert {name.rpartition(".")[2] for name in bundle.facts.modules} == {"q_proj", "down_proj"}
    assert write.difference < 1e-4
    assert json.loads((tmp_path / "bundle" / "fedtune.json").read_text())["bundle"]["dtype"] == "float32"


def test_a_recipe_needs_no_data_which_are_at_the_sites(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'model = {{ base = "{checkpoints["llama"]}" }}\nmethod = {{ name = "fedkseed", bank = "kron" }}\n'
    )
    assert read_source(recipe).model.base == str(checkpoints["llama"])


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_8_bits_take_a_quarter_and_compute_in_float32(name: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = tiny_base(name, checkpoints["llama"])
    whole = write_bundle(base, tmp_path / "whole", dtype="float32", signer=None)
    small = write_bundle(base, tmp_path / "small", dtype="int8", signer=None)
    assert small.sizes["weights"] < 0.45 * whole.sizes["weights"]  # biases and norms of so small a model weigh much
    assert small.difference < 1e-5
    bundle = read_bundle(tmp_path / "small")
    # The manifest is of the base and not of its codes: all clients of a run have the same one.
    assert bundle.manifest == read_bundle(tmp_path / "whole").manifest == base.manifest
    rounded = in_float32(base, rounded_axes(base, {entry.name: entry.shape for entry in base.manifest.entries}))
    prompt = [5, 60, 200, 7]
    with torch.inference_mode():
        expected = rounded.model(torch.tensor([prompt])).logits[0, -1].argmax()
    assert list(load(bundle, threads=1).continue_tokens(None, (), prompt, new_tokens=1)) == [int(expected)]
    assert not np.shares_memory(
        next(rounded.model.parameters()).detach().numpy(), next(base.model.parameters()).detach().numpy()
    )


def broken_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    original = onnx_graph.Decoder._rotate
    monkeypatch.setattr(
        onnx_graph.Decoder, "_rotate", lambda self, x, rotation: original(self, x, (rotation[1], rotation[0]))
    )


def broken_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    original = onnx_weights.put
    monkeypatch.setattr(onnx_weights, "put", lambda file, place, tensor: original(file, place, tensor * 1.01))


def broken_path(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedtune.edge import onnx_runtime

    monkeypatch.setattr(onnx_runtime, "orient", lambda squares, transposed: np.ascontiguousarray(squares))


@pytest.mark.parametrize("fault", [broken_rotation, broken_weights, broken_path])
def test_a_graph_with_other_losses_than_torch_is_not_written(
    fault: Any,
    checkpoints: dict[str, Path],
    parties: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fault(monkeypatch)
    with pytest.raises(ConfigError, match=r"as torch computes it; got .* from the graph; .*nothing was signed"):
        export_bundle(checkpoints["llama"], tmp_path / "bundle", identity=parties["server"])
    assert not list(tmp_path.iterdir())


def test_losses_that_jump_with_the_smallest_steps_are_refused(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a runtime that rounds activations: everything else about it may be within the tolerance."""
    from fedtune.edge.onnx_runtime import OnnxPosition

    original = OnnxPosition.losses

    def noisy(self: OnnxPosition, batch: PaddedRows, moves: Any) -> Any:
        losses = original(self, batch, moves)
        small = len(moves) == 2
        return [loss + (0.002 * place if small else 0) for place, loss in enumerate(losses)]

    monkeypatch.setattr(OnnxPosition, "losses", noisy)
    with pytest.raises(ConfigError, match=r"losses 1e-6 apart to differ by less than 0\.001"):
        write_bundle(tiny_base("llama", checkpoints["llama"]), tmp_path / "bundle", dtype="float32", signer=None)


def test_ctrl_c_leaves_nothing(checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: Any) -> float:
        raise KeyboardInterrupt

    monkeypatch.setattr(edge_bundle, "compare", stop)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(tiny_base("llama", checkpoints["llama"]), tmp_path / "bundle", dtype="float32", signer=None)
    assert not list(tmp_path.iterdir())


def test_what_cannot_become_a_bundle_is_refused_before_it_is_loaded(
    checkpoints: dict[str, Path], parties: Mapping[str, Path], tmp_path: Path, tables: dict[str, Any]
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").write_text("mine")
    with pytest.raises(StoreError, match="expected a new or an empty folder; it holds files; choose another"):
        export_bundle(checkpoints["llama"], full)
    for dtype in ("int4", "bfloat16", "dynamic"):
        with pytest.raises(ConfigError, match=f"expected one of float32, int8; got '{dtype}'; activations are never"):
            export_bundle(checkpoints["llama"], tmp_path / "bundle", dtype=dtype)
    with pytest.raises(ConfigError, match="coordinator"):
        export_bundle(checkpoints["llama"], tmp_path / "bundle", identity=parties["site-a"])
    from fedtune.config import bind
    from fedtune.config.render import render

    tables["adapter"] = {"targets": ["q_proj"], "modules_to_save": ["lm_head"]}
    del tables["override"]
    (tmp_path / "recipe.toml").write_text(render(bind(tables)))
    with pytest.raises(ConfigError, match=r"expected a causal base without adapter\.modules_to_save"):
        export_bundle(tmp_path / "recipe.toml", tmp_path / "bundle")
    other = renamed(tiny_base("llama", checkpoints["llama"]))
    with pytest.raises(ConfigError, match="expected one of llama, qwen2, qwen3, gpt2"):
        write_bundle(other, tmp_path / "bundle", dtype="float32", signer=None)
    assert not (tmp_path / "bundle").exists()


def renamed(base: Base) -> Base:
    """Return a base whose config names a family that has no graph."""
    from copy import deepcopy

    model = deepcopy(base.model)
    model.config.__class__ = type("Other", (type(model.config),), {"model_type": "mamba"})
    return replace(base, model=model)
