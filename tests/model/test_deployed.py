from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ConfigError, ShapeError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.model import deployed
from fedtune.model.base import Base, load_tokenizer
from fedtune.model.base import load as load_base
from fedtune.model.deployed import (
    anatomy_at,
    change_of,
    load,
    load_pruned_base,
    uniform,
    write,
    write_uniform,
)
from fedtune.model.merge import merge
from fedtune.model.pruned_training import block_layout as anatomy_in_full
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.surgery import layout_of, with_structure
from fedtune.pruning.structure import BlockLayout, BlockStructure, ModelStructure, full_block
from tests.model.test_surgery import CAUSAL, CONFIGS, IDS, MASK, base_of, build, logits, random_adapter, random_keep

CPU = torch.device("cpu")
REST: dict[str, Any] = {"saved": {}, "dtype": "float32", "revision": None}


def stored(name: str, folder: Path) -> tuple[Base, BlockLayout]:
    """Return a tiny base with its checkpoint in a folder."""
    model = build(name)
    model.save_pretrained(folder)
    anatomy = layout_of(model)
    return replace(base_of(model, anatomy), path=str(folder)), anatomy


def same(keep: ModelStructure, anatomy: BlockLayout, kept: BlockStructure) -> ModelStructure:
    return ModelStructure(tuple(kept for _ in anatomy.blocks))


def merged_into(model: Any, adapter: Adapter) -> None:
    with torch.no_grad():
        for name, factors in adapter.items():
            module, change = model.get_submodule(name), change_of(factors)
            turned = change.T if isinstance(module, Conv1D) else change
            module.weight.copy_((module.weight.double() + turned).float())


def generated(model: Any) -> list[int]:
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": MASK[:1], "pad_token_id": 0}
    result: list[int] = model.generate(IDS[:1], **options)[0].tolist()
    return result


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


def test_the_stock_classes_refuse_the_folder(tmp_path: Path) -> None:
    base, anatomy = stored("llama-gqa", tmp_path / "base")
    write(tmp_path / "out", base, random_keep(anatomy, 3), anatomy, None, **REST)
    with pytest.raises(ValueError, match="fedtune-pruned-llama"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with pytest.raises(RuntimeError, match="mismatched"):
        LlamaForCausalLM.from_pretrained(tmp_path / "out")


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
            uniform(
                model.config, same(full_block(anatomy), anatomy, BlockStructure((0, 1, 2), (0, 1, 2), (0,))), anatomy
            )
        if name != "llama-mha":  # what they refuse is what would not load
            model.config.num_attention_heads = 3
            with pytest.raises(ValueError, match=r"multiple|divisible"):
                type(model)(model.config)
    with pytest.raises(ConfigError, match=r"equal widths.*got heads from \d to \d; .* channels from"):
        uniform(model.config, random_keep(anatomy, 1), anatomy)


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


def test_an_adapter_on_tied_weights_is_not_dropped_in_silence(loaded: Any, tmp_path: Path) -> None:
    base = loaded("llama", targets=["lm_head"])
    base.model.config.tie_word_embeddings = True
    base.model.lm_head.weight = base.model.model.embed_tokens.weight
    anatomy = anatomy_in_full(base)
    factors = Factors(a=np.ones((1, anatomy.width), np.float32), b=np.ones((anatomy.outputs, 1), np.float32))
    adapter = {"lm_head": factors}
    with pytest.raises(ConfigError, match=r"lm_head shares its weight with .*embed_tokens"):
        write(tmp_path / "out", base, full_block(anatomy), anatomy, adapter, **REST)


def settings_of(folder: Path, task: str = "causal", dtype: str = "float32") -> ModelSettings:
    return ModelSettings(base=str(folder), task=task, dtype=dtype, device="cpu")  # type: ignore[arg-type]


def whole_base(settings: ModelSettings, labels: Sequence[str] = ()) -> Base:
    tokenizer = load_tokenizer(settings, Path())
    adapter = AdapterSettings(rank=4, targets=("all-linear",))
    return load_base(settings, adapter, tokenizer=tokenizer, root=Path(), seed=5, labels=labels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gpt2-classifier"])
def test_a_base_read_at_its_pruned_widths_is_the_whole_one_pruned(
    name: str, dtype: str, checkpoints: dict[str, Path]
) -> None:
    """With the head that the checkpoint lacks, under names that it gives without a prefix."""
    task = "causal" if name in ("llama", "gpt2") else "classification"
    settings = settings_of(checkpoints[name.partition("-")[0]], task, dtype)
    labels = () if task == "causal" else ("a", "b", "c")
    base = whole_base(settings, labels)
    anatomy = anatomy_at(settings, root=Path())
    assert anatomy == layout_of(base.model)
    keep = random_keep(anatomy, 7)
    found = load_pruned_base(settings, keep, root=Path(), seed=5, labels=labels)
    assert found.digest == base.digest
    assert {name.rpartition(".")[0] for name in found.new} == (set() if task == "causal" else set(base.saved_modules))
    with with_structure(base.model, keep, anatomy):
        ours, theirs = found.model.state_dict(), base.model.state_dict()
        assert ours.keys() == theirs.keys()
        for key in ours:
            assert torch.equal(ours[key], theirs[key].to(ours[key].dtype)), key
        if dtype == "float32":
            found.model.config.pad_token_id = base.model.config.pad_token_id
            with torch.inference_mode():
                assert torch.equal(logits(found.model), logits(base.model))
    assert found.model.config.id2label == base.model.config.id2label
    if task == "causal":
        assert found.model.generation_config.to_dict() == base.model.generation_config.to_dict()


def one_at_a_time(files: Sequence[Path]) -> deployed.Source:
    """Read a checkpoint that complains when a tensor is still there as the next one is read."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def wrapped(read: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def once() -> torch.Tensor:
            assert not [ref for ref in alive if ref() is not None]
            tensor = read()
            alive[:] = [weakref.ref(tensor)]
            return tensor

        return once

    return {key: wrapped(read) for key, read in real_reading(files).items()}


real_reading = deployed.reading


def test_only_one_tensor_of_the_whole_base_is_there_at_once(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployed, "reading", one_at_a_time)
    settings = settings_of(checkpoints["llama"])
    anatomy = anatomy_at(settings, root=Path())
    keep = same(full_block(anatomy), anatomy, BlockStructure((0, 1), (0,), (0, 1, 2)))
    model = load_pruned_base(settings, keep, root=Path(), seed=0).model
    storage = {parameter.untyped_storage().data_ptr(): parameter for parameter in model.parameters()}
    held = sum(parameter.untyped_storage().nbytes() for parameter in storage.values())
    assert held == sum(parameter.nbytes for parameter in storage.values())  # no view of something larger


def test_what_was_read_does_not_hang_on_the_file(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model.save_pretrained(tmp_path)
    settings = settings_of(tmp_path)
    keep = full_block(anatomy_at(settings, root=Path()))
    found = load_pruned_base(settings, keep, root=Path(), seed=0).model
    before = {name: parameter.clone() for name, parameter in found.named_parameters()}
    file = tmp_path / "model.safetensors"
    with file.open("r+b") as opened:  # in place: a mapped tensor would change with it
        opened.seek(file.stat().st_size // 4)
        opened.write(bytes(file.stat().st_size // 2))
    assert all(torch.equal(parameter, before[name]) for name, parameter in found.named_parameters())


def test_a_checkpoint_in_several_files_is_read_by_its_index(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    settings = settings_of(checkpoints["llama"])
    keep = random_keep(anatomy_at(settings, root=Path()), 2)
    one = load_pruned_base(settings, keep, root=Path(), seed=0)
    many = load_pruned_base(settings_of(tmp_path), keep, root=Path(), seed=0)
    assert one.digest == many.digest
    parts = zip(one.model.parameters(), many.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parts)


def test_bases_that_cannot_be_read_are_refused(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    settings = settings_of(checkpoints["llama"])
    anatomy = anatomy_at(settings, root=Path())
    keep = random_keep(anatomy, 2)
    with pytest.raises(ConfigError, match=r"model\.base"):
        anatomy_at(settings_of(tmp_path / "nowhere"), root=Path())
    with pytest.raises(ConfigError, match=r"model\.base"):
        load_pruned_base(settings_of(tmp_path / "nowhere"), keep, root=Path(), seed=0)
    with pytest.raises(ShapeError, match="expected 2 blocks"):
        load_pruned_base(settings, ModelStructure(keep.blocks[:1]), root=Path(), seed=0)
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "q_proj" not in k}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 2 of the model's tensors: model\.layers\.0\.self_attn\.q_proj"):
        load_pruned_base(settings_of(tmp_path), keep, root=Path(), seed=0)
    wrong = {**tensors, "model.layers.1.mlp.up_proj.weight": torch.zeros(50, 32)}
    save_file(wrong, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ShapeError, match=r"up_proj\.weight: expected \(48, 32\)"):
        load_pruned_base(settings_of(tmp_path), keep, root=Path(), seed=0)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.base"):
        load_pruned_base(settings_of(tmp_path), keep, root=Path(), seed=0)


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
