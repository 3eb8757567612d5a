from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from transformers import (
    XLNetConfig,
    XLNetForSequenceClassification,
)

from fedtune.data.encode import Example
from fedtune.model.batches import batches, collate
from fedtune.model.loss import logits_of


def test_a_classifier_that_reads_the_last_position_is_padded_on_the_left() -> None:
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        stock = XLNetForSequenceClassification(XLNetConfig(vocab_size=9, pad_token_id=0, **sizes)).eval()
    tokenizer = SimpleNamespace(padding_side="left", pad_token_type_id=3)
    base: Any = SimpleNamespace(
        model=stock, tokenizer=tokenizer, task="classification", device=torch.device("cpu"), pad_id=0, fused=False
    )
    ids, types = ([5, 6, 7, 3], [4, 3]), ([0, 0, 0, 2], [0, 2])
    rows = [
        Example(np.array(own), 0, 0, "", "", len(own), np.array(kinds)) for own, kinds in zip(ids, types, strict=True)
    ]
    batch = collate(rows, base)
    assert batch.inputs["token_type_ids"].tolist() == [[0, 0, 0, 2], [3, 3, 0, 2]]
    with torch.inference_mode():
        together = logits_of(stock, batch, task="classification")
        alone = torch.cat([logits_of(stock, collate([row], base), task="classification") for row in rows])
    torch.testing.assert_close(together, alone)


def test_models_without_token_types_are_given_none(loaded: Any, examples: Any) -> None:
    base = loaded()
    typed = [replace(row, token_types=np.ones_like(row.input_ids)) for row in examples(2)]
    assert collate(typed, base).token_types is None


def test_every_example_is_seen_once_before_any_is_seen_twice() -> None:
    order = batches(7, size=3, key=3)
    epochs = [[position for _ in range(3) for position in next(order)] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 2
    assert epochs[0] != epochs[1]
