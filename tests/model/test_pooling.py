from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from fedtune.data.encode import Example
from fedtune.errors import ConfigError
from fedtune.model.base import Base, base_from_object, load, load_tokenizer
from fedtune.model.base_sizes import sized_base
from fedtune.model.batches import collate
from fedtune.model.evaluate import classify
from fedtune.model.merge import merge
from fedtune.model.pooling import FIRST, NATIVE, POOLED, masked_mean
from fedtune.model.settings import AdapterSettings, ModelSettings
from tests.model.families import CLASSIFIERS, build

LABELS = ["bad", "fair", "good"]
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])


@pytest.fixture(scope="module")
def tokenizer(checkpoints: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(checkpoints["llama"])


def classifier(folder: Path, pooling: Any = "auto", **settings: Any) -> Base:
    chosen = ModelSettings(base=str(folder), task="classification", device="cpu", pooling=pooling, **settings)
    adapter = AdapterSettings(rank=2, targets=["all-linear"])
    return load(chosen, adapter, tokenizer=load_tokenizer(chosen, Path()), root=Path(), seed=0, labels=LABELS)


def example(ids: list[int], label: int) -> Example:
    return Example(np.array(ids), label, 0, "", "", len(ids))


def as_sentence_encoder(folder: Path, **modes: bool) -> Path:
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **modes}))
    return folder


def states(base: Base) -> torch.Tensor:
    """Last hidden states of the two texts, as the body gives them without any hook."""
    body = base.model.base_model
    hooks = dict(body._forward_hooks)
    body._forward_hooks.clear()
    try:
        hidden: torch.Tensor = body(input_ids=IDS, attention_mask=MASK).last_hidden_state
    finally:
        body._forward_hooks.update(hooks)
    return hidden


def read_by_head(base: Base) -> torch.Tensor:
    """What the first layer of the head reads, at its first token where it reads all of them."""
    seen = list[torch.Tensor]()
    heads = [module for name, module in base.model.named_children() if module is not base.model.base_model]
    first = next(layer for head in heads for layer in head.modules() if isinstance(layer, torch.nn.Linear))
    handle = first.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        base.model(input_ids=IDS, attention_mask=MASK)
    handle.remove()
    return seen[0]


def test_padding_is_no_part_of_the_mean() -> None:
    hidden = torch.tensor([[[1.0, 8.0], [3.0, 4.0], [100.0, 100.0]]])
    assert masked_mean(hidden, torch.tensor([[1, 1, 0]])).tolist() == [[2.0, 6.0]]
    assert masked_mean(hidden[:, :2], None).tolist() == [[2.0, 6.0]]
    assert masked_mean(hidden.bfloat16(), torch.tensor([[0, 1, 0]])).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", sorted((POOLED | FIRST) & CLASSIFIERS.keys()))
def test_the_head_reads_the_mean_or_the_first_state(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    folder = build(kind, CLASSIFIERS[kind], tmp_path, tokenizer)
    for pooling in ("mean", "cls"):
        base = classifier(folder, pooling)
        with torch.no_grad():
            hidden = states(base)
        wanted = masked_mean(hidden, MASK) if pooling == "mean" else hidden[:, 0]
        torch.testing.assert_close(read_by_head(base), wanted)
        assert not [name for name in base.modules if "pooler.dense" in name and kind in POOLED]
    assert base.saved  # the new head


def test_modernbert_pools_by_its_own_config(tmp_path: Path, tokenizer: Any) -> None:
    folder = build("modernbert", CLASSIFIERS["modernbert"], tmp_path, tokenizer)
    logits = {}
    for pooling in ("mean", "cls", "model"):
        base = classifier(folder, pooling)
        with torch.no_grad():
            logits[pooling] = base.model(input_ids=IDS, attention_mask=MASK).logits
    assert not torch.equal(logits["mean"], logits["cls"])
    assert torch.equal(logits["model"], logits["cls"])  # its default


def test_auto_reads_what_a_sentence_encoder_says(tmp_path: Path, tokenizer: Any) -> None:
    folder = build("bert", CLASSIFIERS["bert"], tmp_path, tokenizer)
    own = classifier(folder)
    assert own.model.bert.pooler is not None
    assert own.digest == classifier(folder, "model").digest  # a base without such a file stays what it was
    as_sentence_encoder(folder, pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)
    mean = classifier(folder)
    assert mean.model.bert.pooler is None
    # Sites that pool otherwise hold another base.
    assert len({own.digest, mean.digest, classifier(folder, "cls").digest}) == 3
    assert mean.digest == classifier(folder, "mean").digest
    assert classifier(folder, "model").digest == own.digest
    assert not [entry for entry in mean.manifest.entries if "pooler" in entry.name]


@pytest.mark.parametrize(
    "modes",
    [
        {"pooling_mode_max_tokens": True},
        {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True},
        {},
    ],
)
def test_a_pooling_that_is_not_known_leaves_the_architectures_own(
    modes: dict[str, bool], tmp_path: Path, tokenizer: Any
) -> None:
    folder = as_sentence_encoder(build("bert", CLASSIFIERS["bert"], tmp_path, tokenizer), **modes)
    assert classifier(folder).model.bert.pooler is not None
    (folder / "1_Pooling" / "config.json").write_text("{torn")
    assert classifier(folder).model.bert.pooler is not None


@pytest.mark.parametrize("kind", ["gpt2", "xlnet"])
def test_other_types_are_refused_by_name(kind: str, tmp_path: Path, tokenizer: Any) -> None:
    folder = build(kind, CLASSIFIERS[kind], tmp_path, tokenizer)
    with pytest.raises(ConfigError, match=rf"model.pooling: expected auto or model for a {kind}; got 'mean'.*roberta"):
        classifier(folder, "mean")
    # A decoder that embeds sentences pools by its last token.
    as_sentence_encoder(folder, pooling_mode_mean_tokens=True)
    assert not classifier(folder).model.base_model._forward_hooks


def test_sizes_alone_know_the_same_modules(tmp_path: Path, tokenizer: Any) -> None:
    folder = build("bert", CLASSIFIERS["bert"], tmp_path, tokenizer)
    settings = ModelSettings(base=str(folder), task="classification", device="cpu", pooling="mean")
    adapter = AdapterSettings(rank=2)
    sized = sized_base(settings, adapter, tokenizer=tokenizer, root=Path(), seed=0, labels=LABELS)
    whole = classifier(folder, "mean")
    assert sized.modules == whole.modules
    assert sized.saved == whole.saved


def test_codes_and_weights_of_one_base_have_one_digest(tmp_path: Path, tokenizer: Any) -> None:
    folder = build("bert", CLASSIFIERS["bert"], tmp_path, tokenizer)
    assert classifier(folder, "mean", dtype="int8").digest == classifier(folder, "mean", dtype="float32").digest


def test_a_merged_model_pools_and_scores_the_same_when_it_is_read_again(tmp_path: Path, tokenizer: Any) -> None:
    folder = as_sentence_encoder(
        build("bert", CLASSIFIERS["bert"], tmp_path / "base", tokenizer), pooling_mode_mean_tokens=True
    )
    base = classifier(folder)
    merge(base, {}, base.saved_tensors(), dtype="float32", revision=None, out=tmp_path / "merged")
    again = classifier(tmp_path / "merged")
    rows = [example([5, 6, 7, 8], 0), example([9, 10], 2)]
    assert classify(again.model, again, rows, batch=2) == classify(base.model, base, rows, batch=2)
    assert again.model.bert.pooler is None


def test_a_given_model_keeps_its_own_pooler(tmp_path: Path, tokenizer: Any) -> None:
    folder = build("bert", CLASSIFIERS["bert"], tmp_path, tokenizer, task="classification")
    given = AutoModelForSequenceClassification.from_pretrained(folder)
    settings = ModelSettings(base="given", task="classification", device="cpu", pooling="mean")
    base = base_from_object(settings, AdapterSettings(rank=2), (given, tokenizer))
    torch.testing.assert_close(read_by_head(base), masked_mean(states(base), MASK))
    assert given.bert.pooler is not None
    assert not given.bert._forward_hooks
    assert base.model.bert.embeddings.word_embeddings.weight is given.bert.embeddings.word_embeddings.weight


def test_batches_of_a_pooled_base_do_not_see_their_padding(tmp_path: Path, tokenizer: Any) -> None:
    base = classifier(build("bert", CLASSIFIERS["bert"], tmp_path, tokenizer), "mean")
    long, short = example([5, 6, 7, 8, 9, 10], 0), example([9, 10], 2)
    with torch.no_grad():
        together = base.model(**collate([long, short], base).inputs).logits[1]
        alone = base.model(**collate([short], base).inputs).logits[0]
    torch.testing.assert_close(together, alone)


def test_native_types_are_none_of_the_hooked_ones() -> None:
    assert not NATIVE & (POOLED | FIRST)
    assert not POOLED & FIRST
