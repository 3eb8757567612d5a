"""Scores that follow from a loss, by hand; against torch they are in tests/edge/test_site.py."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest

from fedtune.probing.rows import PaddedRows, pad
from fedtune.probing.scores import by_length, likelihood_at, likelihood_scores
from fedtune.probing.steps import Move


def test_batches_by_length_hold_every_position_once(examples: Any) -> None:
    rows = examples(10)
    positions = [position for batch in by_length(rows, 3) for position in batch]
    assert sorted(positions) == list(range(10))
    lengths = [len(rows[position].input_ids) for position in positions]
    assert lengths == sorted(lengths)


def test_scores_follow_from_the_summed_loss(examples: Any) -> None:
    rows = examples(2)  # of 6 and 9 tokens, two characters each
    scores = likelihood_scores(6.0, 3, rows)
    assert scores == {
        "loss": 2.0,
        "perplexity": pytest.approx(math.exp(2.0)),
        "bits_per_character": pytest.approx(6.0 / math.log(2) / 30),
        "tokens": 3,
        "examples": 2,
    }
    assert likelihood_scores(5e6, 3, rows)["perplexity"] == math.exp(700.0)
    assert likelihood_scores(0.0, 0, rows)["loss"] == 0.0


class Lengths:
    """A position whose mean loss is the length of the padded batch."""

    def losses(self, batch: PaddedRows, moves: Sequence[Move]) -> Sequence[float]:
        assert [amount for _, amount in moves] == [0]
        return [float(batch.input_ids.shape[1])]

    def move(self, seed: int, amount: int) -> None:
        raise AssertionError("a score moves nothing")


def test_batches_weigh_by_the_tokens_that_count(examples: Any) -> None:
    rows = examples(4)  # of 6, 9, 12 and 15 tokens, of which 4, 6, 8 and 10 count
    scores = likelihood_at(Lengths(), partial(pad, pad_id=0), rows, batch=2)
    assert scores["tokens"] == 28
    assert scores["loss"] == pytest.approx((9 * 10 + 15 * 18) / 28)
