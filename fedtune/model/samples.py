"""Greedy answers to prompts, for people to read, and their scores against references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedtune.data.encode import IGNORED, Example
from fedtune.data.prompts import open_ids
from fedtune.lora.adapter import Adapter
from fedtune.model.base import Base
from fedtune.model.evaluate import continue_text, likelihood, rouge_l
from fedtune.model.lora import with_adapters
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class Prompt:
    """A text that a model continues."""

    question: str
    """As it is shown."""
    text: str
    """As the model reads it."""
    special: bool = True
    """Whether the tokenizer adds its own special tokens to the text."""
    reference: str = ""
    """The answer to score against; empty for none."""


@dataclass(frozen=True)
class Answer:
    text: str
    """Without the prompt."""
    scores: Mapping[str, float]
    """`rouge_l` (F1) of the answer, and `loss` (nats per token) of the reference; empty without a reference."""


def answers(
    base: Base, adapter: Adapter, saved: Tensors, prompts: Sequence[Prompt], *, new_tokens: int
) -> Sequence[Answer]:
    """Return the global model's greedy answer to each prompt; the adapter is attached once."""
    with with_adapters(base, frozen=adapter, saved=saved) as model, torch.inference_mode():
        return [answer(model, base, prompt, new_tokens=new_tokens) for prompt in prompts]


def answer(model: Any, base: Base, prompt: Prompt, *, new_tokens: int) -> Answer:
    """Return one greedy answer and its scores."""
    text = continue_text(
        model, base, open_ids(base.tokenizer, prompt.text, special=prompt.special), new_tokens=new_tokens
    )
    return Answer(text, dict(scores(model, base, prompt, text)) if prompt.reference else {})


def scores(model: Any, base: Base, prompt: Prompt, text: str) -> Iterator[tuple[str, float]]:
    """Yield how near an answer is to the reference, and how likely the reference is to the model."""
    yield "rouge_l", rouge_l(prompt.reference, text)
    if example := reference_example(base, prompt):
        yield "loss", likelihood(model, base, [example], batch=1)["loss"]


def reference_example(base: Base, prompt: Prompt) -> Example | None:
    """Return prompt and reference as one example, of which the answer's tokens count; None if none of them fits."""
    encoded = base.tokenizer(prompt.text + prompt.reference, add_special_tokens=prompt.special)
    places = range(len(prompt.text), len(prompt.text) + len(prompt.reference))
    # White space may belong to no token.
    lead = next((token for place in places if (token := encoded.char_to_token(place)) is not None), None)
    ids = np.array(encoded["input_ids"][: base.positions], dtype=np.int64)
    if lead is None or max(1, lead) >= len(ids):
        return None
    labels = ids.copy()
    labels[: max(1, lead)] = IGNORED
    return Example(ids, labels, len(prompt.reference), prompt.text, prompt.reference, lead)


class TextStream:
    """Writes a continuation piece by piece; a `streamer` of transformers' generate."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._written, self._begun = 0, False

    def put(self, tokens: torch.Tensor) -> None:
        """Take the prompt, the first time, and then each token."""
        if not self._begun:
            self._begun = True
            return
        self._ids += tokens.flatten().tolist()
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        # The first bytes of a character that takes several tokens.
        if not text.endswith("\ufffd"):
            self._flush(text)

    def end(self) -> None:
        self._flush(self._tokenizer.decode(self._ids, skip_special_tokens=True))

    def _flush(self, text: str) -> None:
        if piece := text[self._written :]:
            self._written = len(text)
            self._write(piece)
