from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
)

from fedtune.errors import ConfigError
from fedtune.model.checkpoint import load_pruned_base
from fedtune.model.deployed import load
from fedtune.model.lora import with_adapters
from fedtune.model.pruned_export import write
from fedtune.model.repair import repair_of
from fedtune.model.surgery import layout_of, with_structure
from fedtune.pruning.structure import cuts, shapes, slice_adapter
from tests.model.pruned_folders import CPU, REST, generated, merged_into, settings_of, stored, whole_base
from tests.model.test_moments import EXACT, measured
from tests.model.test_surgery import CAUSAL, CONFIGS, IDS, logits, random_adapter, random_keep

LABELS = {"causal": (), "classification": ("a", "b", "c")}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_folder_of_unequal_widths_reloads_exactly(name: str, tmp_path: Path) -> None:
    base, anatomy = stored(name, tmp_path / "base")
    keep, adapter = random_keep(anatomy, 3), random_adapter(anatomy)
    cost = write(tmp_path / "out", base, keep, anatomy, adapter, **REST)
    assert cost.applied == pytest.approx(1, abs=1e-4)
    found = load(tmp_path / "out", dtype="float32", device=CPU)
    merged_into(base.model, adapter)
    with with_structure(base.model, keep, anatomy), torch.inference_mode():
        assert torch.equal(logits(found), logits(base.model))  # difference 0.0
        ours, theirs = dict(found.named_parameters()), dict(base.model.named_parameters())
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert all(torch.equal(a, b) for a, b in zip(found.buffers(), base.model.buffers(), strict=True))
        if name in CAUSAL:
            assert generated(found) == generated(base.model)
    assert not any(parameter.requires_grad for parameter in found.parameters())
    assert not found.training
    assert layout_of(found).blocks == tuple(
        replace(block, heads=len(kept.q), kv_heads=len(kept.kv), channels=len(kept.ff))
        for block, kept in zip(anatomy.blocks, keep.blocks, strict=True)
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_a_repaired_model_is_written_read_and_loaded_as_it_was_trained(name: str, tmp_path: Path) -> None:
    """From the folder of the model, and from base, structure and moments; layers without a bias have one then."""
    base, anatomy = stored(name, tmp_path / "base")
    keep, adapter, moments = random_keep(anatomy, 3), random_adapter(anatomy), measured(name, EXACT)[0]
    write(tmp_path / "out", base, keep, anatomy, adapter, **REST, moments=moments)
    found = load(tmp_path / "out", dtype="float32", device=CPU)
    task = "causal" if name in CAUSAL else "classification"
    small = load_pruned_base(
        settings_of(tmp_path / "base", task), keep, root=Path(), seed=0, labels=LABELS[task], moments=moments
    )
    with with_structure(base.model, keep, anatomy, repair_of(base.model, moments, EXACT, anatomy)):
        ours, theirs = dict(small.model.named_parameters()), dict(base.model.named_parameters())
        assert ours.keys() == theirs.keys()
        for key, parameter in ours.items():
            torch.testing.assert_close(parameter, theirs[key], atol=1e-6, rtol=1e-6)
        sliced = slice_adapter(adapter, cuts(keep, anatomy))
        small_base = replace(base, modules=shapes(base.modules, cuts(keep, anatomy)))
        with with_adapters(small_base, frozen=sliced), torch.inference_mode():
            torch.testing.assert_close(logits(found), logits(base.model), atol=1e-4, rtol=1e-4)
    with with_structure(base.model, keep, anatomy), torch.inference_mode():
        assert (logits(found) - logits(base.model)).abs().max() > 1e-2


def test_a_bias_that_no_repair_gives_is_refused(tmp_path: Path) -> None:
    base, anatomy = stored("qwen2", tmp_path / "base")
    out = tmp_path / "out"
    write(out, base, random_keep(anatomy, 3), anatomy, None, **REST, moments=measured("qwen2", EXACT)[0])
    config = json.loads((out / "config.json").read_text())
    assert config["fedtune_pruning"]["biases"]
    for biases in (["lm_head"], ["model.layers.9.mlp.down_proj"], [], 3):
        config["fedtune_pruning"]["biases"] = biases
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(ConfigError, match="a folder of a pruned model as fedtune exports it"):
            load(out, dtype="float32", device=CPU)


def test_a_folder_that_is_damaged_or_not_ours_is_refused(tmp_path: Path) -> None:
    base, anatomy = stored("qwen2", tmp_path / "base")
    out = tmp_path / "out"
    write(out, base, random_keep(anatomy, 3), anatomy, None, **REST)
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")

    def refused(match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            load(out, dtype="float32", device=CPU)

    with pytest.raises(ConfigError, match="FileNotFoundError"):
        load(tmp_path / "nowhere", dtype="float32", device=CPU)
    with pytest.raises(ConfigError, match="fedtune_pruning"):
        load(tmp_path / "base", dtype="float32", device=CPU)
    hostile: Sequence[tuple[str, Callable[[dict[str, Any]], Any]]] = (
        ("model_type", lambda c: c.update(model_type="fedtune-pruned-phi3")),
        ("format", lambda c: c["fedtune_pruning"].update(format=2)),
        ("shorter|longer", lambda c: c["fedtune_pruning"]["blocks"].pop()),
        ("for every key/value head", lambda c: c["fedtune_pruning"]["blocks"][0].update(heads=3, kv_heads=2)),
        ("at most", lambda c: c["fedtune_pruning"]["blocks"][0].update(heads=9, kv_heads=9)),
        ("at most", lambda c: c["fedtune_pruning"]["blocks"][0].update(heads=10**9, kv_heads=10**9)),
        ("at most", lambda c: c["fedtune_pruning"]["blocks"][0].update(channels=10**9)),
        ("at most", lambda c: c["fedtune_pruning"]["blocks"][0].update(channels=-1)),
        ("got none", lambda c: c["fedtune_pruning"]["blocks"][0].update(heads=0, kv_heads=0)),
        ("at most", lambda c: c["fedtune_pruning"]["blocks"][0].update(channels=25)),
        ("is \\(", lambda c: c["fedtune_pruning"]["blocks"][0].update(channels=1)),
        ("unexpected keyword", lambda c: c["fedtune_pruning"]["blocks"][0].update(scaling=2)),
        ("TypeError", lambda c: c.update(fedtune_pruning=3)),
        ("task 'zzz'", lambda c: c["fedtune_pruning"].update(task="zzz")),
        ("hidden_size", lambda c: c.update(hidden_size="x")),
        ("ZeroDivision|division|heads", lambda c: c.update(num_attention_heads=0)),
    )
    for match, change in hostile:
        changed = json.loads(json.dumps(config))
        change(changed)
        (out / "config.json").write_text(json.dumps(changed))
        refused(match)
    (out / "config.json").write_text(json.dumps(config))
    save_file({**tensors, "extra": torch.zeros(1)}, out / "model.safetensors")
    refused("not those of the config: extra")
    save_file({key: value for key, value in tensors.items() if "norm" not in key}, out / "model.safetensors")
    refused("not those of the config")
    data = (tmp_path / "base" / "model.safetensors").read_bytes()
    for size in (0, 4, 100, len(data) // 2):
        (out / "model.safetensors").write_bytes(data[:size])
        refused("SafetensorError")
    for broken in ("{", "1", '"x"', "null", "[]"):
        (out / "config.json").write_text(broken)
        refused("Error")


def test_code_in_the_folder_is_not_run(tmp_path: Path) -> None:
    base, anatomy = stored("llama-gqa", tmp_path / "base")
    out = tmp_path / "out"
    write(out, base, random_keep(anatomy, 3), anatomy, None, **REST)
    config = json.loads((out / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.Evil"}
    config["attn_implementation"] = config["_attn_implementation"] = "somebody/kernels"
    config["quantization_config"] = {"quant_method": "somebody's"}
    (out / "config.json").write_text(json.dumps(config))
    (out / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    assert type(load(out, dtype="float32", device=CPU)) is LlamaForCausalLM
    assert not (tmp_path / "ran").exists()


def test_the_settings_of_generation_travel(tmp_path: Path) -> None:
    base, anatomy = stored("mistral", tmp_path / "base")
    base.model.generation_config = GenerationConfig(eos_token_id=[7, 9], max_new_tokens=5)
    write(tmp_path / "out", base, random_keep(anatomy, 1), anatomy, None, **REST)
    found = load(tmp_path / "out", dtype="float32", device=CPU)
    assert (found.generation_config.eos_token_id, found.generation_config.max_new_tokens) == ([7, 9], 5)
    with pytest.raises(ConfigError, match="dynamic cache"):
        found.generate(IDS[:1], cache_implementation="static", disable_compile=True)


def test_a_real_model_is_written_and_read(stories: Path, tmp_path: Path) -> None:
    settings = settings_of(stories)
    base = whole_base(settings)
    anatomy = layout_of(base.model)
    keep, adapter = random_keep(anatomy, 1), random_adapter(anatomy)
    write(tmp_path / "out", base, keep, anatomy, adapter, **REST)
    found = load(tmp_path / "out", dtype="float32", device=CPU)
    small = load_pruned_base(settings, keep, root=Path(), seed=0)
    assert small.digest == base.digest
    ids = torch.arange(5, 45)[None]
    with with_structure(base.model, keep, anatomy), torch.inference_mode():
        assert torch.equal(logits(small.model, ids, None), logits(base.model, ids, None))
    merged_into(base.model, adapter)
    with with_structure(base.model, keep, anatomy), torch.inference_mode():
        assert torch.equal(logits(found, ids, None), logits(base.model, ids, None))
