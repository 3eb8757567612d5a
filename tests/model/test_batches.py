from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    XLNetConfig,
    XLNetForSequenceClassification,
)

from fedtune.data.encode import Example
from fedtune.model.batches import collate, rows_of
from fedtune.model.loss import logits_of
from fedtune.probing.order import batches


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


@given(st.lists(st.integers(1, 30), min_size=1, max_size=20))
def test_every_example_is_in_one_row_no_longer_than_the_longest(lengths: list[int]) -> None:
    rows = rows_of(lengths)
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    sums = [sum(lengths[place] for place in row) for row in rows]
    assert max(sums) == max(lengths)
    # No two rows could be one.
    assert all(left + right > max(lengths) for i, left in enumerate(sums) for right in sums[:i])


def test_a_packed_batch_by_hand(loaded: Any) -> None:
    texts = [[5, 6], [7, 8, 9, 10, 11], [12, 13]]
    rows = [Example(np.array(ids), np.array(ids), 0, "", "", 0) for ids in texts]
    batch = collate(rows, base := loaded(), packed=True)
    pad = base.pad_id
    assert batch.input_ids.tolist() == [[7, 8, 9, 10, 11], [5, 6, 12, 13, pad]]
    assert batch.positions is not None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 0]]
    assert batch.labels.tolist() == [[-100, 8, 9, 10, 11], [-100, 6, -100, 13, -100]]
    assert set(batch.inputs) == {"input_ids", "position_ids"}
    plain = collate(rows, base)
    assert (batch.count, batch.tokens) == (plain.count, plain.tokens) == (6, 9)


def test_models_without_token_types_are_given_none(loaded: Any, examples: Any) -> None:
    base = loaded()
    typed = [replace(row, token_types=np.ones_like(row.input_ids)) for row in examples(2)]
    assert collate(typed, base).token_types is None


def test_every_example_is_seen_once_before_any_is_seen_twice() -> None:
    order = batches(7, size=3, key=3)
    epochs = [[position for _ in range(3) for position in next(order)] for _ in range(2)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(7))] * 2
    assert epochs[0] != epochs[1]
