"""Tiny bases with checkpoints in folders, and what tests of pruned models compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from fedtune.lora.adapter import Adapter
from fedtune.model.base import Base, load_tokenizer
from fedtune.model.base import load as load_base
from fedtune.model.pruned_export import weight_change
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.surgery import layout_of
from fedtune.pruning.structure import BlockLayout, BlockStructure, ModelStructure
from tests.model.test_surgery import IDS, MASK, base_of, build

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
            module, change = model.get_submodule(name), weight_change(factors)
            turned = change.T if isinstance(module, Conv1D) else change
            module.weight.copy_((module.weight.double() + turned).float())


def generated(model: Any) -> list[int]:
    options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": MASK[:1], "pad_token_id": 0}
    result: list[int] = model.generate(IDS[:1], **options)[0].tolist()
    return result


def settings_of(folder: Path, task: str = "causal", dtype: str = "float32") -> ModelSettings:
    return ModelSettings(base=str(folder), task=task, dtype=dtype, device="cpu")  # type: ignore[arg-type]


def whole_base(settings: ModelSettings, labels: Sequence[str] = ()) -> Base:
    tokenizer = load_tokenizer(settings, Path())
    adapter = AdapterSettings(rank=4, targets=("all-linear",))
    return load_base(settings, adapter, tokenizer=tokenizer, root=Path(), seed=5, labels=labels)
