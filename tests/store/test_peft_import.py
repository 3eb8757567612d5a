from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM

from fedtune.errors import ConfigError
from fedtune.lora.adapter import delta
from fedtune.store.peft import PREFIX
from fedtune.store.peft_import import read_adapter

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def foreign(base: Path, out: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **config: Any) -> Any:
    """Save a random adapter with stock peft, and return its model."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **config))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.data.copy_(values.to(dtype).float())
    model.save_pretrained(out)
    if dtype != torch.float32:
        import safetensors.torch

        path = out / "adapter_model.safetensors"
        tensors = {name: value.to(dtype) for name, value in safetensors.torch.load_file(path).items()}
        safetensors.torch.save_file(tensors, path)
    return model


def stock_deltas(model: Any) -> dict[str, Any]:
    """Return every module's change of its weight, (out, in), as peft computes it."""
    return {
        name.removeprefix(PREFIX): module.get_delta_weight("default").detach().numpy()
        for name, module in model.named_modules()
        if "default" in getattr(module, "lora_A", {})
    }


@pytest.mark.parametrize(
    "config",
    [
        {"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "up_proj"]},
        {"r": 4, "lora_alpha": 3, "target_modules": ["v_proj"], "use_rslora": True},
        {
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"layers.0.self_attn.q_proj": 5, "v_proj": 1},
            "alpha_pattern": {r"layers\.1\..*q_proj": 9},
        },
    ],
)
def test_the_change_is_the_one_that_stock_peft_computes(
    config: dict[str, Any], checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    model = foreign(checkpoints["llama"], tmp_path / "a", **config)
    read = read_adapter(tmp_path / "a")
    stock = stock_deltas(model)
    assert read.adapter.keys() == stock.keys()
    for name, factors in read.adapter.items():
        np.testing.assert_allclose(delta(factors), stock[name], atol=1e-6)
    assert read.target.base == str(checkpoints["llama"])
    assert read.rank == max(config["r"], *config.get("rank_pattern", {}).values(), 0)


def test_bfloat16_which_numpy_lacks_is_read(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    config: dict[str, Any] = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    model = foreign(checkpoints["llama"], tmp_path / "a", dtype=torch.bfloat16, **config)
    stock = stock_deltas(model)
    for name, factors in read_adapter(tmp_path / "a").adapter.items():
        np.testing.assert_allclose(delta(factors), stock[name], atol=1e-6)


def test_a_run_directory_stands_for_its_adapter(ran: Any) -> None:
    of_run, of_folder = read_adapter(ran.path), read_adapter(ran.adapter)
    assert of_run.digest == of_folder.digest
    assert len(of_run.base_digest) == 64


@pytest.fixture
def plain(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    foreign(checkpoints["llama"], tmp_path / "a", r=2, lora_alpha=2, target_modules=["q_proj"])
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "peft_type LORA, PROMPT_TUNING, P_TUNING, PREFIX_TUNING; got 'LOHA'"),
        ({"use_dora": True}, "use_dora = true"),
        ({"bias": "all"}, "expected no trained biases"),
        ({"lora_bias": True}, "expected no trained biases"),
        ({"target_parameters": ["experts.gate"]}, "target_parameters"),
        ({"init_lora_weights": "pissa_niter_4"}, "which changes the base"),
        ({"task_type": "SEQ_2_SEQ_LM"}, "task_type CAUSAL_LM or SEQ_CLS"),
        ({"r": "2"}, "r and lora_alpha as numbers"),
        ({"r": 3}, "expected rank 3 of .*q_proj, as adapter_config.json says; got 2"),
        ({"rank_pattern": {"(": 2}}, "expected regular expressions"),
    ],
)
def test_what_is_more_than_two_factors_is_refused(plain: Path, changes: dict[str, Any], message: str) -> None:
    config = json.loads((plain / "adapter_config.json").read_text())
    (plain / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError, match=message):
        read_adapter(plain)


def test_damaged_folders_are_refused(plain: Path, tmp_path: Path) -> None:
    weights = plain / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))
    for changed, message in (
        ({**tensors, f"{PREFIX}model.embed_tokens.weight": np.zeros((2, 2), np.float32)}, "embed_tokens"),
        ({**tensors, f"{PREFIX}x.lora_magnitude_vector": np.zeros(2, np.float32)}, "lora_magnitude_vector"),
        ({name: value for name, value in tensors.items() if name != first}, "both factors"),
        ({**tensors, first: np.zeros((2, 3, 1), np.float32)}, r"\(rank, in\)"),
        ({**tensors, first: tensors[first].astype(np.int64)}, "numbers of F64"),
    ):
        save_file(changed, weights)
        with pytest.raises(ConfigError, match=message):
            read_adapter(plain)
    weights.write_bytes(weights.read_bytes()[:-7])
    with pytest.raises(ConfigError, match="a whole safetensors file"):
        read_adapter(plain)
    weights.rename(plain / "adapter_model.bin")
    with pytest.raises(ConfigError, match=r"got adapter_model\.bin; save it as safetensors"):
        read_adapter(plain)
    with pytest.raises(ConfigError, match=r"no adapter_model\.safetensors"):
        read_adapter(tmp_path / "none")
    (plain / "adapter_model.bin").rename(weights)
    for text in ("{", "[]"):
        (plain / "adapter_config.json").write_text(text)
        with pytest.raises(ConfigError, match="JSON"):
            read_adapter(plain)
