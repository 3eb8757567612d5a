from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from fedtune.data.encode import IGNORED, Example
from fedtune.messages import Training
from fedtune.model.base import Base
from fedtune.model.stacked_train import join_rows, limit_gradients, longer, row_batches

Examples = Callable[[int], list[Example]]
TRAINING = Training(batch=3, learning_rate=0.1, steps=1)


def test_a_client_with_fewer_examples_gets_rows_that_do_not_count(
    loaded: Callable[..., Base], examples: Examples
) -> None:
    base, rows = loaded(), examples(4)  # of 6, 9, 12 and 15 tokens, the first third of which is prompt
    part = join_rows([rows[:3], rows[3:], []], base, TRAINING)
    assert part.batch.input_ids.shape == (9, 15)
    assert part.batch.attention_mask.sum(1).tolist() == [6, 9, 12, 15, 1, 1, 1, 1, 1]
    assert part.counts == [4 + 6 + 8, 10, 0]
    assert part.tokens.tolist() == [27, 15, 0]
    assert part.batch.count == sum(part.counts)
    assert (part.batch.labels[4:] == IGNORED).all()


def test_a_batch_is_never_as_long_as_it_has_rows(loaded: Callable[..., Base], examples: Examples) -> None:
    base, rows = loaded(), examples(2)  # the longer of which has 9 tokens
    part = join_rows([rows, [], []], base, TRAINING)
    assert part.batch.input_ids.shape == (9, 10)
    assert (part.batch.input_ids[:, 9] == base.pad_id).all()
    assert not part.batch.attention_mask[:, 9].any()
    assert (part.batch.labels[:, 9] == IGNORED).all()


def test_a_batch_that_is_padded_on_the_left_grows_on_the_left(
    loaded: Callable[..., Base], examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = loaded()
    batch = join_rows([examples(1)], base, replace(TRAINING, batch=1)).batch
    types = replace(batch, token_types=torch.ones_like(batch.input_ids))
    monkeypatch.setattr("fedtune.model.stacked_train.padding_side", lambda base: "left")
    grown = longer(types, base)
    assert grown.token_types is not None
    assert not grown.attention_mask[:, 0].any()
    assert not grown.token_types[:, 0].any()
    assert torch.equal(grown.input_ids[:, 1:], batch.input_ids)


def test_gradients_are_limited_client_by_client() -> None:
    # Norms of 5, 0.5 and infinity over both parameters: only the first is scaled, and the last counts as none.
    first, second = (torch.nn.Parameter(torch.zeros(3, 1, 1)) for _ in range(2))
    first.grad = torch.tensor([3.0, 0.3, math.inf]).view(3, 1, 1)
    second.grad = torch.tensor([4.0, 0.4, 1.0]).view(3, 1, 1)
    limit_gradients([first, second], 1.0, [1.0, 1.0, math.nan])
    np.testing.assert_allclose(first.grad.flatten(), [0.6, 0.3, 0.0], rtol=1e-6)
    np.testing.assert_allclose(second.grad.flatten(), [0.8, 0.4, 0.0], rtol=1e-6)


def test_gradients_are_left_alone_without_a_limit() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, 1, 1))
    parameter.grad = torch.tensor([3.0, 4.0]).view(2, 1, 1)
    limit_gradients([parameter], None, [1.0, 1.0])
    assert parameter.grad.flatten().tolist() == [3.0, 4.0]


def test_rows_of_unequal_numbers_are_seen_once_each() -> None:
    rows: list[list[Any]] = [[1, 2, 3], [4], []]
    found: list[Any] = list(row_batches(rows, 2))
    assert found == [[[1, 2], [4], []], [[3], [], []]]
