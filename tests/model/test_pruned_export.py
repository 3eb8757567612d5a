from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)

from fedtune.errors import ConfigError, ShapeError
from fedtune.lora.adapter import Factors
from fedtune.model.deployed import load
from fedtune.model.merge import merge
from fedtune.model.pruned_export import uniform_config, write, write_uniform
from fedtune.model.pruned_training import block_layout
from fedtune.model.repair import repair_of
from fedtune.model.surgery import layout_of, with_structure
from fedtune.pruning.structure import BlockStructure, full_block
from tests.model.pruned_folders import CPU, REST, merged_into, same, stored
from tests.model.test_moments import EXACT, measured
from tests.model.test_surgery import CAUSAL, CONFIGS, base_of, build, logits, random_adapter, random_keep


def test_half_precision_is_cast_once_at_the_end(tmp_path: Path) -> None:
    base, anatomy = stored("llama-gqa", tmp_path / "base")
    keep, adapter = random_keep(anatomy, 3), random_adapter(anatomy)
    rest = {**REST, "dtype": "bfloat16"}
    cost = write(tmp_path / "out", base, keep, anatomy, adapter, **rest)
    assert 0 < cost.error < 0.1
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in held  # tied
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    merged_into(base.model, adapter)
    with with_structure(base.model, keep, anatomy):
        expected = {name: p.detach().to(torch.bfloat16) for name, p in base.model.named_parameters()}
    found = load(tmp_path / "out", dtype="bfloat16", device=CPU)
    assert all(torch.equal(parameter, expected[name]) for name, parameter in found.named_parameters())
    assert logits(found).dtype == torch.bfloat16


def test_what_the_whole_model_would_be_is_what_merge_writes(loaded: Any, tmp_path: Path) -> None:
    base = loaded("llama", targets=("all-linear",))
    anatomy = layout_of(base.model)
    adapter = random_adapter(anatomy)
    ours = write_uniform(tmp_path / "ours", base, full_block(anatomy), anatomy, adapter, **REST)
    theirs = merge(base, adapter, {}, dtype="float32", revision=None, out=tmp_path / "theirs")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert ours.applied == pytest.approx(theirs.applied)
    assert {file.name for file in (tmp_path / "theirs").iterdir()} == {
        file.name for file in (tmp_path / "ours").iterdir()
    }
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs")]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_equal_widths_load_in_stock_transformers(name: str, tmp_path: Path) -> None:
    base, anatomy = stored(name, tmp_path / "base")
    block = anatomy.blocks[0]
    kv = tuple(range(block.kv_heads)) if anatomy.family in ("gpt2", "bert", "roberta") else (block.kv_heads - 1,)
    q = tuple(head * block.group + i for head in kv for i in range(block.group))
    keep = same(full_block(anatomy), anatomy, BlockStructure(q=q, kv=kv, ff=(1, 4, 5, 9, 20)))
    adapter = random_adapter(anatomy)
    write_uniform(tmp_path / "out", base, keep, anatomy, adapter, **REST)
    auto = AutoModelForCausalLM if name in CAUSAL else AutoModelForSequenceClassification
    found, info = auto.from_pretrained(tmp_path / "out", output_loading_info=True, attn_implementation="sdpa")
    assert not any(info.values())
    merged_into(base.model, adapter)
    with with_structure(base.model, keep, anatomy), torch.inference_mode():
        torch.testing.assert_close(logits(found.eval()), logits(base.model), atol=1e-5, rtol=1e-5)
    assert not (tmp_path / "out" / "config.json").read_text().count("fedtune")


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3"])
def test_three_of_four_heads_load_where_the_size_of_a_head_is_named(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]()[1]
    config.num_key_value_heads = 4
    kind = CONFIGS[name]()[0]
    model = kind(config).eval()
    model.save_pretrained(tmp_path / "base")
    anatomy = layout_of(model)
    keep = same(full_block(anatomy), anatomy, BlockStructure((0, 1, 3), (0, 1, 3), (0, 1, 2)))
    write_uniform(
        tmp_path / "out", replace(base_of(model, anatomy), path=str(tmp_path / "base")), keep, anatomy, None, **REST
    )
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with with_structure(model, keep, anatomy), torch.inference_mode():
        torch.testing.assert_close(logits(found.eval()), logits(model), atol=1e-5, rtol=1e-5)


def test_widths_that_no_stock_config_can_say_are_refused_with_the_nearest_that_it_can() -> None:
    for name, expected in (("llama-mha", "2 or 4 heads"), ("gpt2", "4 heads"), ("bert", "4 heads")):
        model = build(name)
        anatomy = layout_of(model)
        with pytest.raises(ConfigError, match=f"{expected} in every block, which a stock {anatomy.family} .* got 3"):
            uniform_config(
                model.config, same(full_block(anatomy), anatomy, BlockStructure((0, 1, 2), (0, 1, 2), (0,))), anatomy
            )
        if name != "llama-mha":  # what they refuse is what would not load
            model.config.num_attention_heads = 3
            with pytest.raises(ValueError, match=r"multiple|divisible"):
                type(model)(model.config)
    with pytest.raises(ConfigError, match=r"equal widths.*got heads from \d to \d; .* channels from"):
        uniform_config(model.config, random_keep(anatomy, 1), anatomy)


def test_an_adapter_on_tied_weights_is_not_dropped_in_silence(loaded: Any, tmp_path: Path) -> None:
    base = loaded("llama", targets=["lm_head"])
    base.model.config.tie_word_embeddings = True
    base.model.lm_head.weight = base.model.model.embed_tokens.weight
    anatomy = block_layout(base)
    factors = Factors(a=np.ones((1, anatomy.width), np.float32), b=np.ones((anatomy.outputs, 1), np.float32))
    adapter = {"lm_head": factors}
    with pytest.raises(ConfigError, match=r"lm_head shares its weight with .*embed_tokens"):
        write(tmp_path / "out", base, full_block(anatomy), anatomy, adapter, **REST)


def test_modules_trained_in_full_and_a_new_head_are_written(loaded: Any, tmp_path: Path) -> None:
    base = loaded("bert", targets=("query", "value"), task="classification", labels=("a", "b"))
    anatomy = layout_of(base.model)
    keep = random_keep(anatomy, 4)
    saved = {name: array + np.float32(1) for name, array in base.saved_tensors().items()}
    write(tmp_path / "with", base, keep, anatomy, None, **{**REST, "saved": saved})
    write(tmp_path / "without", base, keep, anatomy, None, **REST)
    model = load(tmp_path / "with", dtype="float32", device=CPU)
    parameters = dict(model.named_parameters())
    assert all((parameters[name].numpy() == array).all() for name, array in saved.items())
    assert model.config.id2label == {0: "a", 1: "b"}
    drawn = dict(load(tmp_path / "without", dtype="float32", device=CPU).named_parameters())
    assert all((drawn[name].numpy() == array).all() for name, array in base.saved_tensors().items())
    with pytest.raises(ShapeError, match="no such module"):
        write(tmp_path / "x", base, keep, anatomy, random_adapter(anatomy), **REST)


def test_the_stock_classes_refuse_the_folder(tmp_path: Path) -> None:
    base, anatomy = stored("llama-gqa", tmp_path / "base")
    write(tmp_path / "out", base, random_keep(anatomy, 3), anatomy, None, **REST)
    with pytest.raises(ValueError, match="fedtune-pruned-llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(RuntimeError, match="mismatched"):
        LlamaForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("name", ["llama-gqa", "mistral", "gpt2"])
def test_a_repaired_uniform_model_loads_in_stock_transformers_where_the_family_has_biases(
    name: str, tmp_path: Path
) -> None:
    base, anatomy = stored(name, tmp_path / "base")
    block = anatomy.blocks[0]
    heads = range(block.heads) if name == "gpt2" else range(block.group)
    kv = tuple(range(block.kv_heads)) if name == "gpt2" else (0,)
    keep = same(full_block(anatomy), anatomy, BlockStructure(tuple(heads), kv, tuple(range(5, 16))))
    moments = measured(name, EXACT)[0]
    if name == "mistral":
        with pytest.raises(ConfigError, match=r"a bias in a stock mistral; got 6 that a repair gives one"):
            write_uniform(tmp_path / "out", base, keep, anatomy, None, **REST, moments=moments)
        assert not (tmp_path / "out").exists()
        return
    write_uniform(tmp_path / "out", base, keep, anatomy, None, **REST, moments=moments)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    repair = repair_of(base.model, moments, EXACT, anatomy)
    with with_structure(base.model, keep, anatomy, repair), torch.inference_mode():
        torch.testing.assert_close(logits(stock), logits(base.model), atol=1e-4, rtol=1e-4)
