"""Virtual tokens on disk: stock peft reads from our folders what we read, and we read what peft wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from fedtune.errors import ConfigError, ShapeError, StoreError
from fedtune.model.base import Base
from fedtune.model.lora import with_adapters
from fedtune.store import manifest, peft, peft_prompt
from fedtune.store.peft_import import read_adapter
from tests.model.test_virtual_tokens import KINDS, load_kind

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # Of stock peft, which gives the cache to transformers under its old name as well.
    pytest.mark.filterwarnings("ignore:Both `past_key_values` and `cache` are set:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning"),
]

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def kind(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=["llama", "gpt2"])
def base(request: pytest.FixtureRequest, checkpoints: dict[str, Path], kind: Any) -> Base:
    return load_kind(checkpoints[request.param], **kind)


def trained(base: Base) -> dict[str, Any]:
    """Return values that no draw has."""
    rng = np.random.default_rng(0)
    return {
        name: array + 0.2 * rng.normal(size=array.shape).astype(np.float32)
        for name, array in base.saved_tensors().items()
    }


def target_of(base: Base) -> peft.Target:
    return peft.Target(base.path, None, base.task, base.transposed, base.saved_modules)


def test_stock_peft_computes_from_an_export_what_we_compute(base: Base, tmp_path: Path) -> None:
    saved = trained(base)
    folder = peft.write(tmp_path / "a", {}, saved, target_of(base), {})
    with with_adapters(base, saved=saved) as model, torch.no_grad():
        ours = model(input_ids=IDS).logits
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base.path), folder).eval()
    with torch.no_grad():
        theirs = stock(input_ids=IDS).logits[:, -IDS.shape[1] :]
        plain = stock.get_base_model()(input_ids=IDS).logits
    assert (ours - theirs).abs().max() < 1e-5
    assert (ours - plain).abs().max() > 1e-2


def test_a_folder_gives_its_tensors_back_to_the_bit(base: Base, tmp_path: Path) -> None:
    saved = trained(base)
    folder = peft.write(tmp_path / "a", {}, saved, target_of(base), {"base": {"digest": "d"}})
    adapter, ours, facts = peft.read(folder)
    foreign = read_adapter(folder)
    assert adapter == foreign.adapter == {}
    assert foreign.rank == 0
    assert foreign.base_digest == facts["base"]["digest"] == "d"
    for read in (ours, foreign.saved):
        assert read.keys() == saved.keys()
        for name, array in saved.items():
            np.testing.assert_array_equal(read[name], array)
    assert peft.read_target(folder) == peft.Target(base.path, None, "causal", False, ())
    assert peft.digest(folder) == foreign.digest


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
        PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8),
    ],
    ids=["prompt", "prefix", "p-tuning"],
)
def test_what_stock_peft_wrote_is_read_as_it_reads_it(
    config: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    stock = get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoints["llama"]), config).eval()
    stock.save_pretrained(tmp_path / "a")
    with torch.no_grad():
        theirs = stock(input_ids=IDS).logits[:, -IDS.shape[1] :]
    saved = read_adapter(tmp_path / "a").saved
    # Of P-tuning peft stores the embeddings alone: they are a prompt's.
    kind = "prefix" if any(".key" in name for name in saved) else "prompt"
    base = load_kind(checkpoints["llama"], kind=kind, tokens=4)
    with with_adapters(base, saved=saved) as model, torch.no_grad():
        ours = model(input_ids=IDS).logits
    assert (ours - theirs).abs().max() < 1e-5


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_virtual_tokens": 6}, "a row for each of 6 virtual tokens"),
        ({"num_virtual_tokens": None}, "a row for each of None"),
        ({"peft_type": "PREFIX_TUNING"}, "num_layers and num_attention_heads, without a projection"),
        ({"peft_type": "PREFIX_TUNING", "num_layers": 5, "num_attention_heads": 3}, "keys and values of 5 layers"),
        ({"peft_type": "PREFIX_TUNING", "num_layers": True, "num_attention_heads": 1}, "num_layers"),
        ({"peft_type": "CARTRIDGE"}, "an adapter of peft_type LORA, PROMPT_TUNING, P_TUNING, PREFIX_TUNING"),
        ({"task_type": "SEQ_CLS"}, "task_type CAUSAL_LM of virtual tokens"),
        ({"modules_to_save": ["lm_head"]}, "virtual tokens alone"),
        ({"num_transformer_submodules": 2}, "virtual tokens of one decoder"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path as text"),
    ],
)
def test_a_configuration_that_is_not_of_the_tensors_is_refused(
    changes: Any, words: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    base = load_kind(checkpoints["llama"], kind="prompt")
    folder = peft.write(tmp_path / "a", {}, trained(base), target_of(base), {})
    (folder / manifest.NAME).unlink()  # an adapter of others has none
    rewrite(folder, **changes)
    with pytest.raises(ConfigError, match=words):
        read_adapter(folder)


def test_a_changed_file_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    base = load_kind(checkpoints["llama"], kind="p-tuning", send="encoder")
    folder = peft.write(tmp_path / "a", {}, trained(base), target_of(base), {})
    rewrite(folder, num_virtual_tokens=4)
    with pytest.raises(StoreError):
        peft.read(folder)
    whole = peft.write(tmp_path / "b", {}, trained(base), target_of(base), {})
    (whole / peft_prompt.ENCODER).unlink()
    with pytest.raises(StoreError, match=r"encoder\.safetensors"):
        peft.read(whole)


@pytest.mark.parametrize(
    "change",
    [
        lambda own: {name: array for name, array in own.items() if name != "encoder.4.bias"},
        lambda own: {name: 2 * array for name, array in own.items()},
        lambda own: {**own, "encoder.0.weight": np.zeros((3, 3), np.float32)},
        lambda own: {"embedding": own["embedding"]},
    ],
    ids=["lacking", "other", "shape", "none"],
)
def test_an_encoder_that_does_not_give_the_embeddings_beside_it_is_refused(
    change: Any, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    base = load_kind(checkpoints["llama"], kind="p-tuning", send="encoder")
    own = {name.partition(".")[2]: array for name, array in trained(base).items()}
    peft_prompt.put(tmp_path, "w.safetensors", trained(base))
    save_file(change(own), tmp_path / peft_prompt.ENCODER)
    tensors = {
        name: peft.parse((tmp_path / name).read_bytes(), tmp_path) for name in ("w.safetensors", peft_prompt.ENCODER)
    }
    config = {"peft_type": "P_TUNING", "num_virtual_tokens": 5}
    with pytest.raises(ShapeError, match="encoder"):
        peft_prompt.virtual_tokens(config, tensors["w.safetensors"], tensors[peft_prompt.ENCODER])
