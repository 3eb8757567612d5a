from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fedtune.errors import ConfigError
from fedtune.model import base as bases
from fedtune.model import quantised_stream, skeleton
from fedtune.model.base import Base, base_of, digest, manifest_of
from fedtune.model.quantised_layers import quantised_layers
from fedtune.model.settings import QUANTISED, AdapterSettings, ModelSettings, QuantisedFormat
from tests.model.families import CAUSAL, build
from tests.model.pruned_folders import settings_of

Loader = Callable[..., Base]
EVERY = AdapterSettings(rank=1, targets=("all-linear",))
REAL_READERS = skeleton.tensor_readers


def load(settings: ModelSettings, labels: tuple[str, ...] = ()) -> Base:
    tokenizer = bases.load_tokenizer(settings, Path())
    return bases.load(settings, EVERY, tokenizer=tokenizer, root=Path(), seed=5, labels=labels)


def same_numbers(one: Base, other: Base) -> None:
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("outside", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "gpt2-classifier"])
def test_a_base_quantised_as_it_is_read_is_the_whole_one_quantised(
    name: str, outside: str, kind: QuantisedFormat, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the digest and the manifest of the unquantised one, and a new head that is drawn alike."""
    task, labels = ("causal", ()) if name in ("llama", "gpt2") else ("classification", ("a", "b", "c"))
    plain = settings_of(checkpoints[name.partition("-")[0]], task, outside)
    settings = replace(plain, dtype=kind, unquantised=outside)  # type: ignore[arg-type]
    whole, streamed = load(plain, labels), load(settings, labels)
    assert (streamed.digest, streamed.manifest) == (whole.digest, whole.manifest)
    assert (streamed.modules, streamed.saved, streamed.transposed) == (whole.modules, whole.saved, whole.transposed)
    assert (streamed.num_parameters, streamed.positions, streamed.fused) == (
        whole.num_parameters,
        whole.positions,
        whole.fused,
    )
    assert np.array_equal(list(streamed.saved_tensors()), list(whole.saved_tensors()))
    monkeypatch.setattr(bases, "stream_quantised", lambda *args, **kwargs: None)
    same_numbers(streamed, load(settings, labels))


def test_one_tensor_is_in_memory_at_a_time(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is gone when the next one is read, the largest of them the embeddings, which stay."""
    alive: list[tuple[str, weakref.ref[torch.Tensor]]] = []

    def watched(files: list[Path]) -> skeleton.TensorReaders:
        def read(key: str, inner: Callable[[], torch.Tensor]) -> torch.Tensor:
            assert not [name for name, tensor in alive if tensor() is not None]
            tensor = inner()
            alive.append((key, weakref.ref(tensor)))
            return tensor

        return {key: partial(read, key, inner) for key, inner in REAL_READERS(files).items()}

    monkeypatch.setattr(quantised_stream, "tensor_readers", watched)
    base = load(replace(settings_of(checkpoints["llama"]), dtype="nf4"))
    assert len(alive) >= len(quantised_layers(base.model)) > 0


FAST = ("qwen3_moe", "mamba", "phi3")


@pytest.mark.parametrize(
    "family",
    [
        family if family in FAST else pytest.param(family, marks=pytest.mark.slow)
        for family in sorted({*CAUSAL} - {"falcon"})
    ],
)
def test_other_families_are_quantised_too(family: str, tmp_path: Path, checkpoints: dict[str, Path]) -> None:
    """Whatever their files look like: where tensors have other names there, they are read whole."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    folder = build(family, CAUSAL[family], tmp_path, tokenizer, task="causal")
    whole = load(settings_of(folder))
    quantised = load(replace(settings_of(folder), dtype="nf4"))
    assert quantised.digest == whole.digest
    assert quantised.manifest == whole.manifest
    assert quantised.modules == whole.modules
    assert quantised_layers(quantised.model)
    ids = torch.arange(3, 15)[None]
    with torch.inference_mode():
        ours, theirs = quantised.model(input_ids=ids).logits, whole.model(input_ids=ids).logits
    assert not torch.equal(ours, theirs)
    # A tenth of every weight is off: the outputs are near, and not those of another model.
    assert float((ours - theirs).norm() / theirs.norm()) < 0.5


def test_a_family_whose_layers_multiply_in_a_way_of_their_own_is_refused(
    tmp_path: Path, checkpoints: dict[str, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoints["llama"])
    folder = build("falcon", CAUSAL["falcon"], tmp_path, tokenizer, task="causal")
    with pytest.raises(ConfigError, match=r"model\.dtype: expected a base with linear layers .* got none in a falcon"):
        load(replace(settings_of(folder), dtype="nf4"))


def test_a_model_from_python_code_is_quantised_in_place(loaded: Loader) -> None:
    base = loaded("llama")
    settings = ModelSettings(base="python", dtype="nf4", device="cpu")
    before, listed = digest(base.model), manifest_of(base.model)
    quantised = base_of(settings, EVERY, base.model, base.tokenizer, path="python")
    assert (quantised.digest, quantised.manifest) == (before, listed)
    assert quantised_layers(quantised.model)


def test_weights_that_are_not_finite_are_refused_by_name(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    folder = changed(checkpoints["llama"], tmp_path, lambda tensors: tensors[name].__setitem__((0, 0), float("nan")))
    with pytest.raises(ConfigError, match=rf"model\.base: expected finite weights; got NaN or infinity in {name}"):
        load(replace(settings_of(folder), dtype="nf4"))


def test_a_tensor_of_another_shape_or_none_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    wide = changed(checkpoints["llama"], tmp_path / "a", lambda t: t.__setitem__(name, t[name][:-1].clone()))
    with pytest.raises(ConfigError, match=rf"{name}: expected \(\d+, \d+\), as the config says"):
        load(replace(settings_of(wide), dtype="nf4"))
    lacking = changed(checkpoints["llama"], tmp_path / "b", lambda t: t.pop(name))
    with pytest.raises(ConfigError, match=rf"it lacks 1 of the model's tensors: {name}"):
        load(replace(settings_of(lacking), dtype="nf4"))


def changed(folder: Path, copy: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    copy.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert json.loads((copy / "config.json").read_text())
    return copy
