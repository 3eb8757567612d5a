from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedtune
from fedtune.errors import ConfigError, StoreError
from tests.store.test_peft_import import foreign, stock_deltas

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": ["v_proj", "q_proj"], "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "rank_pattern": {"layers.0.self_attn.q_proj": 5},
        "alpha_pattern": {"down_proj": 9},
    },
}
WEIGHTS = (0.5, -0.25, 2.0)


@pytest.fixture(scope="module")
def three(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[Path, dict[str, Any]]:
    """Three adapters of one base, as unlike each other as PEFT allows, with their changes by module."""
    folder = tmp_path_factory.mktemp("three")
    return {
        folder / name: stock_deltas(foreign(checkpoints["llama"], folder / name, seed=place, **config))
        for place, (name, config) in enumerate(KINDS.items())
    }


def loaded(base: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)


def test_the_sum_is_what_stock_peft_loads(
    three: dict[Path, dict[str, Any]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    merged = fedtune.merge(list(three), weights=WEIGHTS, out=tmp_path / "m")
    assert (merged.rank, merged.energy_kept) == (3 + 4 + 5, 1.0)
    got = stock_deltas(loaded(checkpoints["llama"], tmp_path / "m"))
    assert got.keys() == {name for deltas in three.values() for name in deltas}
    for name, change in got.items():
        parts = [
            weight * deltas[name] for weight, deltas in zip(WEIGHTS, three.values(), strict=True) if name in deltas
        ]
        np.testing.assert_allclose(change, sum(parts), atol=1e-5)
    content = json.loads((tmp_path / "m" / "fedtune.json").read_text())
    assert [part["weight"] for part in content["merged"]] == list(WEIGHTS)


def test_without_weights_it_is_the_mean(
    three: dict[Path, dict[str, Any]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    path, deltas = next(iter(three.items()))
    fedtune.merge([path, path], out=tmp_path / "m")
    for name, change in stock_deltas(loaded(checkpoints["llama"], tmp_path / "m")).items():
        np.testing.assert_allclose(change, deltas[name], atol=1e-5)


def test_a_cut_is_the_best_of_its_rank_and_names_what_is_left(
    three: dict[Path, dict[str, Any]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    merged = fedtune.merge(list(three), weights=WEIGHTS, max_rank=2, out=tmp_path / "m")
    whole = fedtune.merge(list(three), weights=WEIGHTS, out=tmp_path / "w")
    assert (merged.rank, whole.rank) == (2, 12)
    exact, short = (stock_deltas(loaded(checkpoints["llama"], run.path)) for run in (whole, merged))
    total, left = 0.0, 0.0
    for name, change in exact.items():
        values = np.linalg.svd(change, compute_uv=False)
        total, left = total + np.sum(values**2), left + np.sum(values[:2] ** 2)
        missing = np.linalg.norm(change - short[name]) ** 2
        assert missing == pytest.approx(np.sum(values[2:] ** 2), rel=1e-3, abs=1e-9)
    assert merged.energy_kept == pytest.approx(left / total, rel=1e-4)
    assert 0.1 < merged.energy_kept < 0.99


def test_a_sum_of_more_ranks_than_a_layer_has_stays_exact(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config: dict[str, Any] = {"r": 20, "lora_alpha": 20, "target_modules": ["q_proj"]}
    models = [foreign(checkpoints["llama"], tmp_path / str(seed), seed=seed, **config) for seed in range(2)]
    merged = fedtune.merge([tmp_path / "0", tmp_path / "1"], weights=[1, 1], out=tmp_path / "m")
    assert merged.rank == 32  # the layer is 32 x 32
    one, two = map(stock_deltas, models)
    for name, change in stock_deltas(loaded(checkpoints["llama"], merged.path)).items():
        np.testing.assert_allclose(change, one[name] + two[name], atol=1e-5)


def test_adapters_of_other_bases_are_refused(
    three: dict[Path, dict[str, Any]], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    first = next(iter(three))
    foreign(checkpoints["gpt2"], tmp_path / "other", r=2, lora_alpha=2, target_modules=["c_attn"], fan_in_fan_out=True)
    with pytest.raises(ConfigError, match=r"expected the base of .*plain"):
        fedtune.merge([first, tmp_path / "other"], out=tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_two_names_of_one_base_need_to_be_said(three: dict[Path, dict[str, Any]], tmp_path: Path) -> None:
    first, second, _ = three
    config = json.loads((second / "adapter_config.json").read_text())
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "adapter_model.safetensors").write_bytes((second / "adapter_model.safetensors").read_bytes())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "someone/llama"}))
    with pytest.raises(ConfigError, match="give --base NAME"):
        fedtune.merge([first, copy], out=tmp_path / "m")
    fedtune.merge([first, copy], out=tmp_path / "m", base="someone/llama")
    written = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "someone/llama"


def test_modules_that_two_adapters_trained_whole_have_no_sum(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    for name, value in (("a", 0.0), ("b", 0.0), ("c", 1.0)):
        model = foreign(checkpoints["llama"], tmp_path / name, **config)
        for parameter in model.base_model.model.lm_head.modules_to_save.parameters():
            parameter.data.fill_(value)
        model.save_pretrained(tmp_path / name)
    same = fedtune.merge([tmp_path / "a", tmp_path / "b"], out=tmp_path / "m")
    model = loaded(checkpoints["llama"], same.path)
    assert not model.base_model.model.lm_head.modules_to_save["default"].weight.any()
    with pytest.raises(ConfigError, match="modules_to_save are whole weights, not changes"):
        fedtune.merge([tmp_path / "a", tmp_path / "c"], out=tmp_path / "n")


@pytest.mark.parametrize("weights", [[1.0], [0.0, 0.0], [float("nan"), 1.0]])
def test_weights_that_do_not_fit_are_refused(
    weights: list[float], three: dict[Path, dict[str, Any]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="weights"):
        fedtune.merge(list(three)[:2], weights=weights, out=tmp_path / "m")


def test_nothing_is_written_over_files_or_without_adapters(three: dict[Path, dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="a new or an empty folder"):
        fedtune.merge(list(three), out=tmp_path)
    with pytest.raises(ConfigError, match="at least one folder"):
        fedtune.merge([], out=tmp_path / "m")
    with pytest.raises(ConfigError, match="max_rank: expected at least 1"):
        fedtune.merge(list(three), max_rank=0, out=tmp_path / "m")
