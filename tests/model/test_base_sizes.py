from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ConfigError
from fedtune.model.base import load, load_tokenizer
from fedtune.model.base_sizes import missing_names, sized_base, stored_names
from fedtune.model.pruned_training import block_layout
from fedtune.model.settings import AdapterSettings, ModelSettings


@pytest.mark.parametrize(
    ("name", "task", "dtype"),
    [("llama", "causal", "float32"), ("llama", "causal", "bfloat16"), ("bert", "classification", "float32")],
)
def test_sizes_are_those_of_the_loaded_base(name: str, task: Any, dtype: Any, checkpoints: dict[str, Path]) -> None:
    settings = ModelSettings(base=str(checkpoints[name]), task=task, dtype=dtype, device="cpu")
    named: Any = {
        "tokenizer": load_tokenizer(settings, Path()),
        "root": Path(),
        "seed": 0,
        "labels": ("a", "b") if task == "classification" else (),
    }
    whole, sized = (make(settings, AdapterSettings(rank=2), **named) for make in (load, sized_base))
    assert all(parameter.is_meta for parameter in sized.model.parameters())
    for field in ("modules", "saved", "saved_modules", "num_parameters", "positions", "fused", "dtype", "task"):
        assert getattr(sized, field) == getattr(whole, field), field
    assert block_layout(sized) == block_layout(whole)
    shapes = [{n: (a.shape, a.dtype) for n, a in base.saved_tensors().items()} for base in (sized, whole)]
    assert shapes[0] == shapes[1]
    assert all(not np.any(array) for array in sized.saved_tensors().values())
    # Directions of seeds are counted, and chosen by `method.trainable`, before weights are read.
    listed = [[(e.name, e.dtype, e.shape) for e in base.manifest.entries] for base in (sized, whole)]
    assert listed[0] == listed[1]


def test_names_come_from_headers_alone(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    names = stored_names(checkpoints["llama"])
    assert "model.embed_tokens.weight" in names
    assert stored_names(tmp_path / "nothing") == set()
    assert missing_names(None, tmp_path / "nothing") == ()


def test_a_folder_without_weights_has_the_sizes_of_its_config(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoints["llama"] / name).read_bytes())
    settings, adapter = ModelSettings(base=str(tmp_path), device="cpu"), AdapterSettings(rank=2)
    named: Any = {"root": Path(), "seed": 0, "tokenizer": load_tokenizer(settings, Path(), weights=False)}
    sized = sized_base(settings, adapter, **named)
    assert sized.modules == load(replace(settings, base=str(checkpoints["llama"])), adapter, **named).modules
    assert sized.notes == [f"model.base: no weights in {tmp_path} yet; its sizes are those of config.json"]
    with pytest.raises(ConfigError, match=r"expected model\.safetensors"):
        load(settings, adapter, **named)
    with pytest.raises(ConfigError, match=r"expected model\.safetensors"):
        load_tokenizer(settings, Path())
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(ConfigError, match="a pickle"):
        sized_base(settings, adapter, **named)
