from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from fedtune.errors import ShapeError
from fedtune.model.skeleton import aliases, fill, match_names, skeleton, state_of


def test_a_skeleton_takes_no_memory_and_is_filled_by_name(checkpoints: dict[str, Path]) -> None:
    model = skeleton(AutoConfig.from_pretrained(checkpoints["llama"]), task="causal", dtype=torch.float32)
    assert all(parameter.is_meta for parameter in model.parameters())
    expected, given = state_of(model), list[tuple[str, str]]()
    readers = {name: lambda shape=shape: torch.zeros(shape) for name, (shape, _) in expected.items()}
    lacking = "model.norm.weight"
    filled = fill(
        model,
        expected,
        {name: read for name, read in readers.items() if name != lacking},
        lambda first, name, tensor: given.append((first, name)),
        first_names=aliases(model),
    )
    assert filled.new == filled.missing == [lacking]
    assert [name for _, name in given] == sorted(expected.keys() - {lacking})
    with pytest.raises(ShapeError, match=r"model\.norm\.weight: expected \(\d+,\), as the config says; got \(3,\)"):
        fill(model, expected, {lacking: lambda: torch.zeros(3)}, lambda *_: None, first_names=aliases(model))


def test_names_of_bodies_heads_and_early_checkpoints_are_matched() -> None:
    readers = {"layer.LayerNorm.gamma": torch.zeros, "bert.pooler.weight": torch.zeros, "else": torch.zeros}
    matched = match_names(readers, {"bert.layer.LayerNorm.weight", "pooler.weight"}, "bert")
    assert set(matched) == {"bert.layer.LayerNorm.weight", "pooler.weight", "else"}
