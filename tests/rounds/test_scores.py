from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.rounds.record import Metrics
from fedtune.rounds.scores import HIGHER_IS_BETTER, LOWER_IS_BETTER, is_better, pooled_scores


def test_losses_are_pooled_by_tokens_and_accuracies_by_examples() -> None:
    ann = {"loss": 2.0, "perplexity": math.exp(2.0), "tokens": 30, "examples": 3}
    bob = {"loss": 4.0, "perplexity": math.exp(4.0), "tokens": 10, "examples": 5}
    pooled = pooled_scores({"bob": bob, "ann": ann})
    assert pooled["loss"] == pytest.approx((2.0 * 30 + 4.0 * 10) / 40)
    assert pooled["perplexity"] == pytest.approx(math.exp(2.5))
    assert (pooled["tokens"], pooled["examples"]) == (40, 8)
    classes = {
        "ann": {"accuracy": 1.0, "loss": 0.5, "examples": 1},
        "bob": {"accuracy": 0.5, "loss": 1.0, "examples": 3},
    }
    assert pooled_scores(classes) == {"accuracy": 0.625, "loss": 0.875, "examples": 4}


def test_answers_are_pooled_by_their_number_and_bits_by_characters() -> None:
    ann = {"rouge_l": 0.5, "generated": 1, "examples": 9, "loss": 2.0, "tokens": 10, "bits_per_character": 1.0}
    bob = {"rouge_l": 1.0, "generated": 3, "examples": 1, "loss": 4.0, "tokens": 10, "bits_per_character": 4.0}
    pooled = pooled_scores({"ann": ann, "bob": bob})
    assert pooled["rouge_l"] == 0.875
    nats = [20 / math.log(2), 40 / math.log(2)]  # in bits
    assert pooled["bits_per_character"] == pytest.approx(sum(nats) / (nats[0] / 1.0 + nats[1] / 4.0))


def test_a_client_without_a_number_is_left_out_of_that_number_alone() -> None:
    scores: dict[str, Metrics] = {"ann": {"loss": None, "examples": 2}, "bob": {"loss": 3.0, "examples": 2}}
    scores["cyd"] = {"loss": math.nan}
    assert pooled_scores(scores) == {"loss": 3.0, "examples": 4}
    assert pooled_scores({}) == {}


@given(st.lists(st.tuples(st.floats(0, 20), st.integers(1, 1000)), min_size=1, max_size=9))
def test_a_pooled_loss_lies_between_those_of_the_clients(clients: list[tuple[float, int]]) -> None:
    scores = {str(n): {"loss": loss, "tokens": tokens, "examples": 1} for n, (loss, tokens) in enumerate(clients)}
    losses = [loss for loss, _ in clients]
    pooled = pooled_scores(scores)["loss"]
    assert pooled is not None
    assert min(losses) - 1e-9 <= pooled <= max(losses) + 1e-9


def test_every_metric_has_one_direction() -> None:
    assert not LOWER_IS_BETTER & HIGHER_IS_BETTER
    assert is_better("loss", 1.0, 2.0)
    assert is_better("rouge_l", 2.0, 1.0)
    assert not is_better("loss", None, 2.0)
    assert not is_better("loss", math.nan, None)
