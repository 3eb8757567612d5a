from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
)

from fedtune.errors import ConfigError, ShapeError
from fedtune.model import checkpoint, skeleton
from fedtune.model.checkpoint import layout_from_config, load_pruned_base
from fedtune.model.surgery import layout_of, with_structure
from fedtune.pruning.structure import BlockStructure, ModelStructure, full_block
from tests.model.families import CLASSIFIERS, build
from tests.model.pruned_folders import same, settings_of, whole_base
from tests.model.test_surgery import logits, random_keep


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
    anatomy = layout_from_config(settings, root=Path())
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


@pytest.mark.parametrize("labels", [("yes", "no", "maybe"), ("a", "b", "c"), ("a", "b")])
def test_a_head_of_other_classes_is_drawn_as_for_the_whole_base(
    labels: Sequence[str], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    folder = build("llama", CLASSIFIERS["llama"], tmp_path, tokenizer, task="classification")
    settings = settings_of(folder, "classification", "float32")
    base, anatomy = whole_base(settings, labels), layout_from_config(settings, root=Path())
    found = load_pruned_base(settings, full_block(anatomy), root=Path(), seed=5, labels=labels)
    assert found.digest == base.digest
    assert torch.equal(found.model.score.weight, base.model.score.weight)
    assert found.model.config.id2label == base.model.config.id2label


def one_at_a_time(files: Sequence[Path]) -> skeleton.TensorReaders:
    """Read a checkpoint that complains when a tensor is still there as the next one is read."""
    alive: list[weakref.ref[torch.Tensor]] = []

    def wrapped(read: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        def once() -> torch.Tensor:
            assert not [ref for ref in alive if ref() is not None]
            tensor = read()
            alive[:] = [weakref.ref(tensor)]
            return tensor

        return once

    return {key: wrapped(read) for key, read in real_readers(files).items()}


real_readers = skeleton.tensor_readers


def test_only_one_tensor_of_the_whole_base_is_there_at_once(
    checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "tensor_readers", one_at_a_time)
    settings = settings_of(checkpoints["llama"])
    anatomy = layout_from_config(settings, root=Path())
    keep = same(full_block(anatomy), anatomy, BlockStructure((0, 1), (0,), (0, 1, 2)))
    model = load_pruned_base(settings, keep, root=Path(), seed=0).model
    storage = {parameter.untyped_storage().data_ptr(): parameter for parameter in model.parameters()}
    held = sum(parameter.untyped_storage().nbytes() for parameter in storage.values())
    assert held == sum(parameter.nbytes for parameter in storage.values())  # no view of something larger


def test_what_was_read_does_not_hang_on_the_file(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoints["llama"])
    model.save_pretrained(tmp_path)
    settings = settings_of(tmp_path)
    keep = full_block(layout_from_config(settings, root=Path()))
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
    keep = random_keep(layout_from_config(settings, root=Path()), 2)
    one = load_pruned_base(settings, keep, root=Path(), seed=0)
    many = load_pruned_base(settings_of(tmp_path), keep, root=Path(), seed=0)
    assert one.digest == many.digest
    parts = zip(one.model.parameters(), many.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in parts)


def test_bases_that_cannot_be_read_are_refused(tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    settings = settings_of(checkpoints["llama"])
    anatomy = layout_from_config(settings, root=Path())
    keep = random_keep(anatomy, 2)
    with pytest.raises(ConfigError, match=r"model\.base"):
        layout_from_config(settings_of(tmp_path / "nowhere"), root=Path())
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
