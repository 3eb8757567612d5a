from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedTokenizerFast,
)

from fedtune.data.encode import encode_classes
from fedtune.data.settings import DataSettings, Split
from fedtune.model.base import load
from fedtune.model.batches import collate
from fedtune.model.loss import logits_of, summed_loss
from fedtune.model.settings import AdapterSettings, ModelSettings


def test_the_loss_equals_the_models_own(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(5)
    batch = collate(rows, base)
    with torch.inference_mode():
        ours = summed_loss(base.model, batch, task="causal") / batch.count
        own = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    torch.testing.assert_close(ours, own)


def test_padding_changes_no_loss(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(4)
    with torch.inference_mode():
        together = summed_loss(base.model, collate(rows, base), task="causal")
        alone = sum(summed_loss(base.model, collate([row], base), task="causal") for row in rows)
    torch.testing.assert_close(together, alone)


WORDS = ["fox", "boat", "clock", "town", "red", "small", "old", "quiet"]


def pairs(folder: Path) -> tuple[Any, Any, list[dict[str, str]]]:
    """Write a BERT that knows pairs, and return it with its tokenizer and rows of unequal lengths."""
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="[UNK]", pad_token="[PAD]", model_input_names=names
    )
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(vocabulary), num_labels=2, initializer_range=0.5, **sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = BertForSequenceClassification(config).eval()
    stock.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [
        {"instruction": " ".join(WORDS[i : i + 2]), "input": " ".join(WORDS[5 : 6 + i]), "label": "ny"[i % 2]}
        for i in range(3)
    ]
    return stock, tokenizer, rows


def test_pairs_are_what_the_stock_model_reads_in_scores_and_in_a_step(tmp_path: Path) -> None:
    stock, tokenizer, rows = pairs(tmp_path)
    base = load(
        ModelSettings(base=str(tmp_path), task="classification", device="cpu"),
        AdapterSettings(rank=2, targets=["query"]),
        tokenizer=tokenizer,
        root=tmp_path,
        seed=0,
        labels=["n", "y"],
    )
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    encoded = encode_classes(columns, DataSettings("x", Split("files")), tokenizer, labels=["n", "y"])
    batch = collate([example for example in encoded.examples if example], base)
    theirs = tokenizer(columns["instruction"], columns["input"], return_tensors="pt", padding=True)
    assert theirs["token_type_ids"].any()
    for name, tensor in batch.inputs.items():
        assert torch.equal(tensor, theirs[name]), name
    truth = torch.tensor([0, 1, 0])
    loss = stock(**theirs, labels=truth, output_hidden_states=False).loss
    ours = summed_loss(base.model, batch, task="classification") / batch.count
    torch.testing.assert_close(ours, loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(logits_of(base.model, batch, task="classification"), stock(**theirs).logits)
    # One step on a layer of the base, as any training takes it.
    name = "bert.encoder.layer.0.attention.self.query.weight"
    weights = [base.model.get_parameter(name).requires_grad_(), stock.get_parameter(name)]
    summed_loss(base.model, batch, task="classification").div(batch.count).backward()
    loss.backward()
    torch.testing.assert_close(weights[0].grad, weights[1].grad, atol=1e-6, rtol=0)
    # A batch that lost them is another input.
    blind = replace(batch, token_types=None)
    assert not torch.allclose(logits_of(base.model, blind, task="classification"), stock(**theirs).logits, atol=1e-3)


@pytest.mark.parametrize("fused", [True, False])
def test_no_keys_and_values_are_kept_for_a_generation_that_never_comes(
    fused: bool, loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, asked = loaded(), list[dict[str, Any]]()
    watched = base.model.model if fused else base.model
    forward = watched.forward

    def listen(**options: Any) -> Any:
        asked.append(options)
        return forward(**options)

    monkeypatch.setattr(watched, "forward", listen)
    summed_loss(base.model, replace(collate(examples(2), base), fused=fused), task="causal")
    assert [options["use_cache"] for options in asked] == [False]
