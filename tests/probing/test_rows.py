"""Padded rows: by hand, and equal to those of the torch client."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from fedtune.model.batches import collate
from fedtune.probing.rows import pad


def test_rows_are_padded_like_those_of_the_torch_client(examples: Any) -> None:
    base: Any = SimpleNamespace(
        device=torch.device("cpu"), task="causal", pad_id=9, fused=False, tokenizer=None, model=None
    )
    for count in (1, 2, 5):
        rows, theirs = pad(examples(count), 9), collate(examples(count), base)
        for name in ("input_ids", "attention_mask", "labels"):
            ours = getattr(rows, name)
            assert ours.dtype == np.int64
            np.testing.assert_array_equal(ours, getattr(theirs, name).numpy())
        assert (rows.count, rows.tokens) == (theirs.count, theirs.tokens)


def test_the_first_token_counts_for_nothing_even_where_a_row_has_no_prompt(examples: Any) -> None:
    [example] = examples(1)
    example.labels[:] = example.input_ids
    rows = pad([example], 0)
    assert (rows.count, rows.tokens) == (len(example.input_ids) - 1, len(example.input_ids))
