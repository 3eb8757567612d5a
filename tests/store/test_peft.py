from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from fedtune.errors import StoreError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.lora import with_adapters
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.store import peft

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def base_of(path: Path, targets: list[str], **model: Any) -> Base:
    settings = ModelSettings(base=str(path), device="cpu", task=model.get("task", "causal"))
    saved = model.get("saved", ())
    return load(
        settings,
        AdapterSettings(rank=2, targets=targets, modules_to_save=saved),
        tokenizer=load_tokenizer(settings, Path()),
        root=Path(),
        seed=0,
        labels=model.get("labels", ()),
    )


def adapter_of(base: Base, ranks: dict[str, int] | int) -> Adapter:
    rng = np.random.default_rng(0)
    made = {}
    for name, (m, n) in base.modules.items():
        rank = ranks if isinstance(ranks, int) else ranks.get(name, 1)
        made[name] = Factors(
            a=rng.normal(size=(rank, n)).astype(np.float32), b=(0.2 * rng.normal(size=(m, rank))).astype(np.float32)
        )
    return made


def target_of(base: Base) -> peft.Target:
    return peft.Target(base.path, None, base.task, base.transposed, base.saved_modules)


def own_logits(base: Base, adapter: Adapter, saved: Any = None) -> torch.Tensor:
    with with_adapters(base, frozen=adapter, saved=saved or {}) as model, torch.inference_mode():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def stock_logits(base: Base, folder: Path) -> torch.Tensor:
    """What somebody gets who has never heard of fedtune."""
    if base.task == "classification":
        stock = AutoModelForSequenceClassification.from_pretrained(base.path, num_labels=3)
    else:
        stock = AutoModelForCausalLM.from_pretrained(base.path)
    model = PeftModel.from_pretrained(stock, folder).eval()
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def check(base: Base, adapter: Adapter, folder: Path, saved: Any = None) -> None:
    peft.write(folder, adapter, saved or {}, target_of(base), {})
    torch.testing.assert_close(stock_logits(base, folder), own_logits(base, adapter, saved), atol=1e-5, rtol=0)


def test_a_uniform_rank_loads_in_stock_peft(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    base = base_of(checkpoints["llama"], ["q_proj", "v_proj"])
    check(base, adapter_of(base, 3), tmp_path / "adapter")


def test_a_rank_per_layer_loads_in_stock_peft(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    base = base_of(checkpoints["llama"], ["all-linear"])
    ranks = {name: 1 + i % 5 for i, name in enumerate(base.modules)}
    check(base, adapter_of(base, ranks), tmp_path / "adapter")


def test_layers_1_and_11_do_not_clash(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    deep = tmp_path / "deep"
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoints["llama"], num_hidden_layers=12)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(deep)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (deep / file).write_bytes((checkpoints["llama"] / file).read_bytes())
    base = base_of(deep, ["q_proj"])
    ranks = {"model.layers.1.self_attn.q_proj": 5, "model.layers.11.self_attn.q_proj": 2}
    check(base, adapter_of(base, ranks), tmp_path / "adapter")


def test_a_layer_without_change_is_left_out(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    base = base_of(checkpoints["llama"], ["q_proj", "v_proj"])
    adapter = adapter_of(base, {"model.layers.0.self_attn.v_proj": 0})
    check(base, adapter, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert "model.layers.0.self_attn.v_proj" not in config["target_modules"]


def test_an_adapter_that_changes_nothing_still_loads(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    base = base_of(checkpoints["llama"], ["q_proj"])
    check(base, adapter_of(base, 0), tmp_path / "adapter")


def test_gpt2s_transposed_layers_load_in_stock_peft(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    base = base_of(checkpoints["gpt2"], ["c_attn", "c_fc"])
    check(base, adapter_of(base, {"transformer.h.1.attn.c_attn": 4}), tmp_path / "adapter")


def test_modules_to_save_load_in_stock_peft(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    base = base_of(checkpoints["llama"], ["q_proj"], saved=["lm_head"])
    saved = {"lm_head.weight": 1.5 * base.saved_tensors()["lm_head.weight"]}
    check(base, adapter_of(base, 2), tmp_path / "adapter", saved)


def test_a_classification_head_loads_in_stock_peft(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    base = base_of(checkpoints["bert"], ["query", "value"], task="classification", labels=["a", "b", "c"])
    saved = {name: array + 0.25 for name, array in base.saved_tensors().items()}
    check(base, adapter_of(base, 2), tmp_path / "adapter", saved)


def test_the_real_model_loads_in_stock_peft(tmp_path: Path, stories: Path) -> None:
    base = base_of(stories, ["q_proj", "v_proj", "down_proj"])
    check(base, adapter_of(base, 4), tmp_path / "adapter")


def test_what_is_written_is_read_back(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    base = base_of(checkpoints["llama"], ["q_proj"], saved=["lm_head"])
    adapter, saved = adapter_of(base, 2), base.saved_tensors()
    peft.write(tmp_path / "adapter", adapter, saved, target_of(base), {"round": 3})
    read, read_saved, provenance = peft.read(tmp_path / "adapter")
    assert provenance == {"round": 3}
    assert read.keys() == adapter.keys()
    for name, factors in adapter.items():
        np.testing.assert_array_equal(read[name].a, factors.a)
        np.testing.assert_array_equal(read[name].b, factors.b)
    np.testing.assert_array_equal(read_saved["lm_head.weight"], saved["lm_head.weight"])
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert peft.target_of(settings) == target_of(base)


def test_the_digest_follows_the_numbers_and_nothing_else(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    base = base_of(checkpoints["llama"], ["q_proj"])
    adapter = adapter_of(base, 2)
    first = peft.digest(peft.write(tmp_path / "a", adapter, {}, target_of(base), {"round": 1}))
    assert first == peft.digest(peft.write(tmp_path / "b", adapter, {}, target_of(base), {"round": 2}))
    other = {name: Factors(a=factors.a, b=2 * factors.b) for name, factors in adapter.items()}
    assert first != peft.digest(peft.write(tmp_path / "c", other, {}, target_of(base), {}))


@pytest.mark.parametrize("damage", ["truncated", "one factor", "missing", "other json"])
def test_a_damaged_adapter_is_named(tmp_path: Path, checkpoints: dict[str, Path], damage: str) -> None:
    base = base_of(checkpoints["llama"], ["q_proj"])
    folder = peft.write(tmp_path / "adapter", adapter_of(base, 2), {}, target_of(base), {})
    weights = folder / "adapter_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif damage == "one factor":
        from safetensors.numpy import load_file, save_file

        tensors = load_file(weights)
        save_file({name: t for name, t in tensors.items() if "0.self_attn.q_proj.lora_A" not in name}, weights)
    elif damage == "missing":
        weights.unlink()
    else:
        (folder / "fedtune.json").write_text("{")
    with pytest.raises(StoreError, match="adapter"):
        peft.read(folder)
