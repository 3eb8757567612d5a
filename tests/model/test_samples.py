from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedtune.model.samples import Prompt, TextStream, answers, reference_example


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


class Characters:
    """A tokenizer of bytes, of which a character may take several."""

    def decode(self, ids: list[int], **options: bool) -> str:
        return bytes(ids).decode(errors="replace")


def test_a_stream_writes_whole_characters_and_not_the_prompt() -> None:
    pieces: list[str] = []
    stream = TextStream(Characters(), pieces.append)
    for tokens in (torch.tensor([[1, 2, 3]]), *(torch.tensor([byte]) for byte in "aé!".encode())):
        stream.put(tokens)
    stream.end()
    assert pieces == ["a", "é", "!"]
    broken: list[str] = []
    stream = TextStream(Characters(), broken.append)
    for tokens in (torch.tensor([[1]]), torch.tensor([97]), torch.tensor([0xC3])):
        stream.put(tokens)
    stream.end()
    assert "".join(broken) == "a\ufffd"  # nothing of what was generated is lost


def test_a_streamed_text_is_the_text(loaded: Any) -> None:
    from fedtune.model.evaluate import continue_text

    base, pieces = loaded(), list[str]()
    ids = base.tokenizer("the quick")["input_ids"]
    stream = TextStream(base.tokenizer, pieces.append)
    text = continue_text(base.model, base, ids, new_tokens=8, streamer=stream)
    assert "".join(pieces) == text
    assert len(pieces) > 1
