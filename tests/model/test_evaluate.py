from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.model.batches import collate
from fedtune.model.evaluate import evaluate, macro_f1, rouge_l
from fedtune.model.samples import Prompt, answers
from fedtune.seeds import derive, generator


def test_the_scores_of_a_causal_model_agree_with_each_other(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(7)
    scores = evaluate(base, {}, {}, {"test": rows, "none": []}, batch=3)
    assert scores.keys() == {"test"}
    test = scores["test"]
    assert test["perplexity"] == pytest.approx(math.exp(test["loss"]))
    assert test["tokens"] == sum(len(row.input_ids) - len(row.input_ids) // 3 for row in rows)
    bits = test["loss"] * test["tokens"] / math.log(2)
    assert test["bits_per_character"] == pytest.approx(bits / sum(row.characters for row in rows))


def test_the_loss_is_a_mean_over_tokens_whatever_the_batch(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(7)
    small, large = (evaluate(base, {}, {}, {"test": rows}, batch=size)["test"]["loss"] for size in (1, 7))
    assert small == pytest.approx(large, rel=1e-5)
    batch = collate(rows, base)
    with torch.inference_mode():
        own = base.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert large == pytest.approx(own.item(), rel=1e-5)


def test_nothing_is_attached_where_there_is_nothing_to_score(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("fedtune.model.evaluate.with_adapters")
    assert evaluate(loaded(), {}, {}, {"test": []}, batch=2) == {}
    assert evaluate(loaded(), {}, {}, {}, batch=2) == {}


def test_accuracy_and_macro_f1_by_hand(loaded: Any, examples: Any) -> None:
    base = loaded("bert", targets=["query"], task="classification", labels=["a", "b"])
    rows = examples(5, classes=2)  # classes 0 1 0 1 0
    head = {"classifier.weight": np.zeros((2, 32), np.float32), "classifier.bias": np.array([1, 0], np.float32)}
    scores = evaluate(base, {}, head, {"test": rows}, batch=2)["test"]  # answers class 0 always
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["macro_f1"] == pytest.approx((2 * 3 / (2 * 3 + 2) + 0) / 2)
    assert scores["loss"] == pytest.approx((3 * math.log(1 + math.exp(-1)) + 2 * math.log(1 + math.e)) / 5, rel=1e-5)


def test_generated_answers_are_scored_against_their_references(loaded: Any, examples: Any) -> None:
    base, rows = loaded(), examples(3)
    scores = evaluate(base, {}, {}, {"test": rows}, batch=2, generate=2, new_tokens=4)["test"]
    assert scores["generated"] == 2
    assert 0 <= scores["rouge_l"] <= 1
    assert scores["exact_match"] in (0.0, 0.5, 1.0)


def test_a_perfect_answer_scores_one(loaded: Any, examples: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, rows = loaded(), examples(2)
    monkeypatch.setattr("fedtune.model.evaluate.continue_text", lambda *args, **kwargs: "the  dog\n")
    scores = evaluate(base, {}, {}, {"test": rows}, batch=2, generate=2)["test"]
    assert (scores["rouge_l"], scores["exact_match"]) == (1.0, 1.0)


def test_an_empty_prompt_is_continued_from_the_first_token_of_a_text(loaded: Any, examples: Any) -> None:
    base = loaded("gpt2", targets=["c_attn"])
    assert base.tokenizer("")["input_ids"] == []  # this tokenizer puts nothing before a text
    empty, first = answers(base, {}, {}, [Prompt("", ""), Prompt("<s>", "<s>")], new_tokens=3)
    assert empty == first
    rows = [replace(row, prompt="", prompt_tokens=0) for row in examples(2)]
    assert evaluate(base, {}, {}, {"test": rows}, batch=2, generate=2, new_tokens=3)["test"]["generated"] == 2


def lcs(first: Sequence[str], second: Sequence[str]) -> int:
    """Return the length of the longest common subsequence, by the textbook's table."""
    lengths = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            lengths[i + 1][j + 1] = lengths[i][j] + 1 if a == b else max(lengths[i][j + 1], lengths[i + 1][j])
    return lengths[-1][-1]


def test_rouge_l_is_lins_f1_of_fifty_fixed_pairs() -> None:
    draws, words = generator(derive(0, "test.rouge")), ("the", "dog", "runs", "fast", "and", "sleeps", "it's")
    for _ in range(50):
        reference, answer = (" ".join(draws.choice(words, draws.integers(1, 12))) for _ in range(2))
        # Words of letters and digits, as rouge-score 0.1.2 divides them: "it's" is two.
        wanted, given = (re.findall("[a-z0-9]+", text) for text in (reference, answer))
        common = lcs(wanted, given)
        f1 = 2 * common / (len(wanted) + len(given))
        assert rouge_l(reference, answer) == pytest.approx(f1)
    assert rouge_l("The DOG runs.", "the dog runs") == 1
    assert rouge_l("the dogs", "the dog") == 0.5  # not stemmed
    assert rouge_l("the dog", "") == 0


@settings(deadline=None)  # the first example loads the package
@given(st.text(st.sampled_from("abc AB'-1é\n"), max_size=40), st.text(st.sampled_from("abc AB'-1é\n"), max_size=40))
def test_rouge_l_is_that_of_the_package_rouge_score(reference: str, answer: str) -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"], use_stemmer=False)
    assert rouge_l(reference, answer) == scorer.score(reference, answer)["rougeL"].fmeasure


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_macro_f1_is_that_of_scikit_learn(pairs: list[tuple[int, int]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    truth, predicted = np.array(pairs, np.int64).T
    assert macro_f1(truth, predicted) == metrics.f1_score(truth, predicted, average="macro", zero_division=0.0)


def test_macro_f1_by_hand() -> None:
    truth, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1])
    # Class 0: one hit of 2 + 1; class 1: one of 1 + 3; class 2 none.
    assert macro_f1(truth, predicted) == pytest.approx((2 / 3 + 2 / 4 + 0) / 3)
