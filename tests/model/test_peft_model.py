from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.errors import ClientError, ShapeError
from fedtune.lora.adapter import Adapter, Factors, draw_a
from fedtune.model.base import Base
from fedtune.model.lora import with_adapters
from fedtune.model.peft_model import (
    add_beside,
    config_of,
    exact_parts,
    lora_layers,
    read_factors,
    restored_modules,
    unwrap,
    with_peft_model,
)
from tests.model.conftest import Loader

# PEFT reads names of transformers that are to go.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

IDS = torch.arange(3, 11)[None]


def adapter(base: Base, *, rank: int, seed: int = 0) -> Adapter:
    rng = np.random.default_rng(seed)
    return {
        name: Factors(a=draw_a(seed, name, rank, n), b=rng.normal(0, 0.2, (m, rank)).astype(np.float32))
        for name, (m, n) in base.modules.items()
    }


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_its_outputs_are_those_of_fedtunes_own_layers(name: str, loaded: Loader) -> None:
    base = loaded(name, targets=("c_attn",) if name == "gpt2" else ("q_proj", "down_proj"))
    local, frozen = adapter(base, rank=3), adapter(base, rank=2, seed=1)
    dense = {module: factors.b @ factors.a for module, factors in frozen.items()}
    for change in (frozen, dense):
        with torch.no_grad():
            with with_adapters(base, frozen=change, local=local, scale=0.7) as model:
                model.eval()
                ours = model(IDS).logits
            with with_peft_model(base, local, frozen=change, scale=0.7) as stock:
                stock.eval()
                theirs = stock(IDS).logits
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


def test_a_base_in_16_bits_keeps_its_weights_and_the_change_its_digits(loaded: Loader) -> None:
    base = loaded("llama", dtype="bfloat16")
    name = next(iter(base.modules))
    layer = base.model.get_submodule(name)
    small = Factors(a=np.full((1, 32), 1e-4, np.float32), b=np.full((32, 1), 1e-4, np.float32))
    parts = exact_parts(small, layer, base.device)
    assert {part.dtype for part in parts} == {torch.float32}
    assert [part.shape for part in exact_parts(np.zeros((32, 32), np.float32), layer, base.device)] == [(32, 32)]
    with restored_modules(base.model), torch.no_grad():
        x = torch.ones(1, 32, dtype=torch.bfloat16)
        before = layer(x)
        add_beside(layer, (torch.full((32, 32), 4.0),), None)
        assert layer(x).dtype == torch.bfloat16
        torch.testing.assert_close(
            layer(x) - before, torch.full((1, 32), 128.0, dtype=torch.bfloat16), rtol=0.02, atol=0
        )
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before, rtol=0, atol=0)


def test_what_a_trainer_saves_loads_with_the_same_outputs(loaded: Loader, tmp_path: Path) -> None:
    from peft import PeftModel

    base = loaded("llama")
    local = {
        name: Factors(a=f.a[:rank], b=f.b[:, :rank]) for rank, (name, f) in enumerate(adapter(base, rank=4).items(), 1)
    }
    with with_peft_model(base, local, scale=2.0) as model, torch.no_grad():
        model.eval()
        expected = model(IDS).logits
        model.save_pretrained(tmp_path)
    with restored_modules(base.model), torch.no_grad():
        again = PeftModel.from_pretrained(base.model, tmp_path)
        torch.testing.assert_close(again.eval()(IDS).logits, expected)


def test_its_configuration_has_the_ranks_and_the_scale(loaded: Loader) -> None:
    base = loaded("llama")
    local = adapter(base, rank=4)
    first, *_ = sorted(local)
    config = config_of(
        base, {**local, first: Factors(a=local[first].a[:2], b=local[first].b[:, :2])}, scale=2.0, dropout=0.1
    )
    assert (config.r, config.lora_alpha, config.lora_dropout) == (4, 8, 0.1)
    assert list(config.rank_pattern.values()) == [2]
    assert list(config.alpha_pattern.values()) == [4]


def test_an_adapter_of_another_scale_is_folded(loaded: Loader) -> None:
    base = loaded("llama")
    local = adapter(base, rank=4)
    with with_peft_model(base, local, scale=2.0) as model:
        for layer in lora_layers(model).values():
            layer.scaling["default"] = 1.0
        read = read_factors(model, local, scale=2.0, client="ann")
    for name, factors in local.items():
        np.testing.assert_array_equal(read[name].b, factors.b / 2)


def test_dora_is_refused(loaded: Loader) -> None:
    from peft import LoraConfig, get_peft_model

    base = loaded("llama")
    with restored_modules(base.model):
        config = LoraConfig(r=4, target_modules=sorted(base.modules), use_dora=True)
        model = get_peft_model(base.model, config)
        with pytest.raises(
            ClientError, match=r"^ann: expected one plain LoRA adapter at .* from its trainer; got DoRA"
        ):
            read_factors(model, adapter(base, rank=4), scale=1.0, client="ann")


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"modules_to_save": ["ln_f"]},
            "an adapter of factors alone from its trainer; got a copy of transformer.ln_f beside",
        ),
        ({"lora_bias": True}, "one plain LoRA adapter at .* from its trainer; got one with a bias"),
    ],
)
def test_what_is_trained_beside_factors_is_not_lost_in_silence(
    options: dict[str, Any], sentence: str, loaded: Loader
) -> None:
    from peft import LoraConfig, get_peft_model

    base = loaded("gpt2", targets=["c_attn"])
    with restored_modules(base.model):
        model = get_peft_model(
            base.model, LoraConfig(r=4, target_modules=sorted(base.modules), fan_in_fan_out=True, **options)
        )
        with pytest.raises(ClientError, match=f"^ann: expected {sentence}"):
            read_factors(model, adapter(base, rank=4), scale=1.0, client="ann")


def test_buffers_have_their_numbers_again(loaded: Loader) -> None:
    base = loaded("llama")
    before = {name: buffer.clone() for name, buffer in base.model.named_buffers()}
    assert before
    with restored_modules(base.model):
        for buffer in base.model.buffers():
            buffer.add_(1)
        base.model.half()
    after = dict(base.model.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_factors_that_do_not_fit_are_refused_before_anything_is_wrapped(loaded: Loader) -> None:
    base = loaded("llama")
    name = next(iter(base.modules))
    wrong = {name: Factors(a=np.zeros((1, 31), np.float32), b=np.zeros((32, 1), np.float32))}
    with pytest.raises(ShapeError, match=name), with_peft_model(base, wrong, scale=1.0):
        pass
    assert not lora_layers(base.model)


def test_wrappers_are_taken_off(loaded: Loader) -> None:
    base = loaded("llama")
    with with_peft_model(base, adapter(base, rank=2), scale=1.0) as model:
        assert unwrap(torch.nn.ModuleDict({"module": model})) is model
        assert unwrap(model) is model
        assert unwrap({"loss": 1.0}) is None
