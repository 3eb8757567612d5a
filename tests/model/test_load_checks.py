from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

from fedtune.errors import ConfigError
from fedtune.model.base import Base, check_packing, load, load_tokenizer
from fedtune.model.batches import collate
from fedtune.model.load_checks import check_causal, check_finite, is_finite, table_positions
from fedtune.model.loss import summed_loss
from fedtune.model.settings import AdapterSettings, ModelSettings
from tests.model.families import CAUSAL, CLASSIFIERS, COMMON, ENCODER, build

SETTINGS = ModelSettings(base="tiny")


def load_folder(folder: Path, *, task: Any = "causal", dtype: Any = "float32", targets: str = "all-linear") -> Base:
    settings = ModelSettings(base=str(folder), device="cpu", task=task, dtype=dtype)
    adapter, tokenizer = AdapterSettings(rank=1, targets=[targets]), load_tokenizer(settings, Path())
    return load(settings, adapter, tokenizer=tokenizer, root=Path(), seed=0, labels=("a", "b"))


@pytest.fixture(scope="module")
def tokenizer(checkpoints: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(checkpoints["llama"])


def bert_folder(folder: Path, tokenizer: Any, **more: Any) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertLMHeadModel(BertConfig(**{**COMMON, **ENCODER, **more})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("dtype", "spread"), [("float32", 0.02), ("float32", 0.1), ("bfloat16", 0.1)])
def test_an_encoder_that_sees_the_future_is_refused(dtype: str, spread: float, tmp_path: Path, tokenizer: Any) -> None:
    folder = bert_folder(tmp_path, tokenizer, initializer_range=spread)
    with pytest.raises(ConfigError, match=r'no token sees a later one; got .*bert.*model\.task = "classification"'):
        load_folder(folder, dtype=dtype)


def test_the_same_encoder_as_a_decoder_is_causal(tmp_path: Path, tokenizer: Any) -> None:
    load_folder(bert_folder(tmp_path, tokenizer, is_decoder=True))


def test_a_model_without_a_limit_of_positions_is_probed_too(tmp_path: Path, tokenizer: Any) -> None:
    folder = build("xlnet", CLASSIFIERS["xlnet"], tmp_path, tokenizer, task="causal")
    with pytest.raises(ConfigError, match="sees a later one"):
        load_folder(folder)
    build("xlnet", CLASSIFIERS["xlnet"], tmp_path, tokenizer)
    assert load_folder(folder, task="classification").positions == 2**31


def test_a_model_that_cannot_read_a_text_is_refused_by_name(loaded: Any) -> None:
    base = loaded()

    def fail(layer: nn.Module, inputs: Any) -> None:
        raise RuntimeError("the size of tensor a\nmust match")

    base.model.model.layers[0].register_forward_pre_hook(fail)
    with pytest.raises(ConfigError, match=r"reads a text; got .*llama.* with RuntimeError: the size of tensor a;"):
        check_causal(SETTINGS, base.model, base.positions)


def test_an_encoder_classifies(tmp_path: Path, tokenizer: Any) -> None:
    load_folder(bert_folder(tmp_path, tokenizer), task="classification")


@pytest.mark.parametrize("kind", ["llama", "gpt_neo", "mistral", "mamba", "gpt_oss", "qwen3_moe"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decoders_of_every_kind_pass_the_probe(kind: str, dtype: str, tmp_path: Path, tokenizer: Any) -> None:
    load_folder(build(kind, CAUSAL[kind], tmp_path, tokenizer, task="causal"), dtype=dtype)


def test_a_decoder_that_a_library_has_broken_is_refused(loaded: Any) -> None:
    base = loaded()
    check_causal(SETTINGS, base.model, base.positions)

    def leak(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0] + 0.01 * inputs[0].mean(1, True), *inputs[1:])

    base.model.model.layers[0].register_forward_pre_hook(leak)
    with pytest.raises(ConfigError, match="sees a later one"):
        check_causal(SETTINGS, base.model, base.positions)


PACKING = [
    *((kind, True) for kind in ("llama", "qwen2", "gpt2", "mistral")),
    *((kind, False) for kind in ("bloom", "opt", "mamba", "gpt_oss")),
]


@pytest.mark.parametrize(("kind", "packed"), PACKING)
def test_models_pack_whose_attention_goes_by_positions(kind: str, packed: bool, tmp_path: Path, tokenizer: Any) -> None:
    base = load_folder(build(kind, CAUSAL[kind], tmp_path, tokenizer, task="causal"))
    assert base.packs == packed
    if packed:
        return check_packing(base)
    with pytest.raises(ConfigError, match=rf"client\.packing: expected .* within the examples.*{kind}.*than alone"):
        check_packing(base)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_packed_batch_has_the_loss_of_each_example_alone_in_every_family_that_packs(
    kind: str, tmp_path: Path, tokenizer: Any, examples: Any
) -> None:
    base, rows = load_folder(build(kind, CAUSAL[kind], tmp_path, tokenizer, task="causal")), examples(6)
    with torch.no_grad():
        packed = summed_loss(base.model, collate(rows, base, packed=True), task="causal").item()
        alone = sum(summed_loss(base.model, collate([row], base), task="causal").item() for row in rows)
    assert base.packs == (packed == pytest.approx(alone, rel=1e-5))


def test_tensors_that_are_not_finite_are_named(loaded: Any) -> None:
    model = loaded().model
    check_finite(SETTINGS, model)
    with torch.no_grad():
        model.get_parameter("model.norm.weight")[3] = float("nan")
        model.get_parameter("lm_head.weight")[2, 1] = -float("inf")
    with pytest.raises(ConfigError, match=r"NaN or infinity in model\.norm\.weight, lm_head\.weight of tiny"):
        check_finite(SETTINGS, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_shows(dtype: torch.dtype, value: float) -> None:
    tensor = torch.ones(3, 4, dtype=dtype)
    assert is_finite(tensor)
    tensor[1, 2] = value
    assert not is_finite(tensor)
    assert is_finite(torch.empty(0, dtype=dtype))
    assert is_finite(torch.ones(2, dtype=torch.int64))


@pytest.mark.parametrize(("kind", "positions"), [("roberta", 62), ("mpnet", 62), ("bert", 64), ("distilbert", 64)])
def test_positions_are_those_of_the_table_behind_the_padding_token(
    kind: str, positions: int, tmp_path: Path, tokenizer: Any
) -> None:
    base = load_folder(build(kind, CLASSIFIERS[kind], tmp_path, tokenizer), task="classification")
    assert base.positions == positions
    ids = torch.full((1, positions), 7)
    base.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    more = torch.full((1, positions + 1), 7)
    with pytest.raises((IndexError, RuntimeError)):
        base.model(input_ids=more, attention_mask=torch.ones_like(more))


def test_rotary_models_have_no_table() -> None:
    assert table_positions(nn.Linear(2, 2)) is None


@pytest.mark.parametrize("of_config", [True, False])
def test_a_padding_token_beyond_the_embeddings_is_replaced_by_one_within(
    of_config: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    shutil.copytree(checkpoints["llama"], tmp_path, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pad_token_id"] = rows if of_config else None
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = load_folder(tmp_path)
    assert base.tokenizer.pad_token_id == rows
    assert base.pad_id == base.tokenizer.eos_token_id
