from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.lora.adapter import Factors
from fedtune.model.lora import with_adapters
from fedtune.model.merge import merge

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def random_adapter(base: Any, size: float) -> dict[str, Factors]:
    rng = np.random.default_rng(0)
    return {
        name: Factors(
            a=rng.normal(size=(3, n)).astype(np.float32), b=(size * rng.normal(size=(m, 3))).astype(np.float32)
        )
        for name, (m, n) in base.modules.items()
    }


@pytest.mark.parametrize(("name", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_attn", "c_fc"])])
def test_the_merged_model_gives_the_adapters_logits(tmp_path: Path, loaded: Any, name: str, targets: list[str]) -> None:
    base = loaded(name, targets=targets)
    adapter = random_adapter(base, 0.1)
    with with_adapters(base, frozen=adapter) as model, torch.inference_mode():
        expected = model(input_ids=IDS).logits
    merged = merge(base, adapter, {}, dtype="float32", revision=None, out=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.inference_mode():
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, atol=2e-5, rtol=0)
    assert merged.applied == pytest.approx(1.0, abs=1e-5)
    assert AutoTokenizer.from_pretrained(tmp_path)("the dog")["input_ids"]


def test_a_low_precision_merge_says_how_much_of_a_tiny_change_arrived(tmp_path: Path, loaded: Any) -> None:
    base = loaded()
    assert merge(base, random_adapter(base, 1e-1), {}, dtype="bfloat16", revision=None, out=tmp_path).applied > 0.99
    tiny = merge(base, random_adapter(base, 1e-6), {}, dtype="bfloat16", revision=None, out=tmp_path)
    assert tiny.error > 0.5


def test_modules_to_save_are_in_the_merged_model(tmp_path: Path, loaded: Any) -> None:
    base = loaded(saved=["lm_head"])
    head = {"lm_head.weight": np.full_like(base.saved_tensors()["lm_head.weight"], 0.5)}
    merge(base, {}, head, dtype="float32", revision=None, out=tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.all(model.lm_head.weight == 0.5)


def test_the_resident_base_is_not_touched(tmp_path: Path, loaded: Any) -> None:
    base = loaded()
    before = base.model(input_ids=IDS).logits
    merge(base, random_adapter(base, 0.1), {}, dtype="float32", revision=None, out=tmp_path)
    assert torch.equal(base.model(input_ids=IDS).logits, before)
