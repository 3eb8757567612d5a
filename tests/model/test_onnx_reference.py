from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from fedtune.data.encode import Example
from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.model.batches import collate
from fedtune.model.loss import summed_loss
from fedtune.model.onnx_reference import in_float32, losses_at
from fedtune.probing.rows import pad
from tests.edge.tiny_models import tiny_base
from tests.model.conftest import Loader


def test_losses_are_those_of_the_model_itself(
    checkpoints: dict[str, Path], examples: Callable[[int], list[Example]]
) -> None:
    base, rows = tiny_base("qwen3", checkpoints["llama"]), examples(3)
    ledger = SeedLedger(Kron(16, 1), 10, 0, base.manifest.digest, np.zeros(16, np.int32))
    with torch.inference_mode():
        batch = collate(rows, base)
        expected = summed_loss(base.model, batch, task="causal").item() / batch.count
    trainable = [base.manifest.ordinals[name] for name in base.matrices]
    here, there = losses_at(base, ledger, trainable, pad(rows, base.pad_id), [(3, 0), (3, 60)])
    np.testing.assert_allclose(here, expected, rtol=1e-6)
    assert abs(there - here) > 1e-3


def test_a_base_in_float32_is_itself_and_others_are_copies(loaded: Loader) -> None:
    plain, half = loaded("llama"), loaded("llama", dtype="bfloat16")
    assert in_float32(plain, {}) is plain
    whole = in_float32(half, {})
    name = "model.layers.0.self_attn.q_proj.weight"
    wide, narrow = (dict(base.model.named_parameters())[name] for base in (whole, half))
    assert (wide.dtype, narrow.dtype, whole.dtype) == (torch.float32, torch.bfloat16, "float32")
    assert torch.equal(wide, narrow.float())


def test_rounded_weights_are_codes_times_scales_and_the_base_keeps_its_own(loaded: Loader) -> None:
    base, name = loaded("gpt2", targets=("c_fc",)), "transformer.h.0.mlp.c_fc.weight"
    before = dict(base.model.named_parameters())[name].clone()
    weight = dict(in_float32(base, {name: 1}).model.named_parameters())[name]
    assert torch.equal(dict(base.model.named_parameters())[name], before)
    codes = weight / (weight.abs().max(0, keepdim=True).values / 127)
    np.testing.assert_allclose(codes.numpy(), codes.round().numpy(), atol=1e-3)
    assert 0 < float((weight - before).abs().max()) <= float(before.abs().max()) / 254 * 1.01
