from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtune.model.samples import Prompt, answers, reference_example


def test_a_sample_is_greedy_and_without_its_prompt(loaded: Any) -> None:
    base, prompt = loaded(), Prompt("the quick", "the quick")
    first, again = answers(base, {}, {}, [prompt, prompt], new_tokens=5)
    assert first == again
    assert not first.text.startswith("the quick")
    assert first.scores == {}


def test_the_reference_counts_after_the_prompt_alone(loaded: Any) -> None:
    base = loaded()
    example = reference_example(base, Prompt("", "the quick brown", reference=" fox jumps"))
    assert example is not None
    counted = example.input_ids[np.asarray(example.labels) != -100]
    assert base.tokenizer.decode(counted) == " fox jumps"
    assert example.characters == len(" fox jumps")


def test_a_reference_that_does_not_fit_has_no_loss(loaded: Any) -> None:
    base = loaded()
    long = Prompt("", "the quick brown fox " * base.positions, reference="dog")
    assert reference_example(base, long) is None
    assert reference_example(base, Prompt("", "the", reference="")) is None
    (short,) = answers(base, {}, {}, [long], new_tokens=2)
    assert short.scores.keys() == {"rouge_l"}


def test_the_loss_of_a_reference_is_stocks(loaded: Any) -> None:
    base, prompt = loaded(), Prompt("", "the quick brown", reference=" fox jumps")
    (scored,) = answers(base, {}, {}, [prompt], new_tokens=2)
    example = reference_example(base, prompt)
    assert example is not None
    ids, labels = (torch.from_numpy(np.asarray(part))[None] for part in (example.input_ids, example.labels))
    with torch.inference_mode():
        stock = base.model(input_ids=ids, labels=labels).loss.item()
    assert scored.scores["loss"] == pytest.approx(stock, rel=1e-5)


def test_an_answer_equal_to_its_reference_scores_one(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.model.samples.continue_text", lambda *args, **kwargs: "the  dog\n")
    (scored,) = answers(loaded(), {}, {}, [Prompt("", "a", reference="the dog")], new_tokens=2)
    assert scored.scores["rouge_l"] == 1.0
