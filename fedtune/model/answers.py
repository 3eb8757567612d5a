"""What a causal model thinks of given answers and what it answers itself: log-likelihoods, losses and continuations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from fedtune.data.encode import IGNORED, Example
from fedtune.data.prompts import open_ids
from fedtune.errors import ConfigError, Fault
from fedtune.model.base import Base
from fedtune.model.batches import collate, reads
from fedtune.model.loss import logits_of
from fedtune.model.torch_seed import torch_seed
from fedtune.seeds import derive

Progress = Callable[[int], None]
"""Called with the number of items that are done."""


@dataclass(frozen=True)
class Continuation:
    """A prompt and one text that may follow it, as tokens."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]

    @property
    def inputs(self) -> tuple[int, ...]:
        """What the model reads to predict every token of the answer."""
        return (*self.prompt, *self.answer[:-1])


def continuation(base: Base, prompt: str, answer: str) -> Continuation:
    """Return a prompt and an answer as tokens, both encoded as one text: a blank belongs to the word behind it.

    What the tokenizer makes of the whole text beyond the prompt's own tokens is the answer, as lm-eval divides it.
    """
    whole = open_ids(base.tokenizer, prompt + answer, special=True)
    lead = open_ids(base.tokenizer, prompt, special=True)
    return Continuation(tuple(whole[: len(lead)]), tuple(whole[len(lead) :]))


@torch.inference_mode()
def log_likelihoods(
    model: Any, base: Base, answers: Sequence[Continuation], *, batch: int, progress: Progress = lambda done: None
) -> Sequence[float]:
    """Return the summed log-probability (natural, at most 0) of every answer's tokens after its prompt.

    Answers that share what the model reads, such as the four letters of a question, cost one forward pass. The longest
    are read first, so that memory fails at the start if at all.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for place, answer in enumerate(answers):
        groups.setdefault(answer.inputs, []).append(place)
    rows = sorted(groups, key=lambda ids: (-len(ids), ids))
    totals, done = [0.0] * len(answers), 0
    for begin in range(0, len(rows), batch):
        part = rows[begin : begin + batch]
        most = max(len(answers[place].answer) for ids in part for place in groups[ids])
        logits = last_logits(model, base, part, most + len(part[0]) - len(part[-1]))
        for row, ids in enumerate(part):
            # Rows are padded on the right to the longest: that many outputs at the end are of padding.
            end = logits.shape[1] - (len(part[0]) - len(ids))
            for place in groups[ids]:
                target = torch.tensor(answers[place].answer, device=logits.device)
                predicted = torch.log_softmax(logits[row, end - len(target) : end].float(), dim=-1)
                totals[place] = predicted.gather(1, target[:, None]).double().sum().item()
                done += 1
        check_numbers(totals)
        progress(done)
    return totals


def last_logits(model: Any, base: Base, rows: Sequence[Sequence[int]], count: int) -> torch.Tensor:
    """Return the last `count` logits, of rows padded on the right to the longest: (rows, count, vocabulary).

    Counted from the end, because virtual tokens before the text have outputs too.
    """
    longest = max(map(len, rows))
    count = min(count, longest)
    ids = torch.full((len(rows), longest), base.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)], mask[number, : len(row)] = torch.tensor(row), 1
    inputs: dict[str, Any] = {"input_ids": ids.to(base.device), "attention_mask": mask.to(base.device)}
    if reads(model, "logits_to_keep"):  # the others are not computed: a prompt's would take a gigabyte
        inputs["logits_to_keep"] = count
    logits: torch.Tensor = model(**inputs, use_cache=False).logits[:, -count:]
    return logits


@torch.inference_mode()
def losses(
    model: Any, base: Base, examples: Sequence[Example], *, batch: int, progress: Progress = lambda done: None
) -> Sequence[tuple[float, int]]:
    """Return each example's (summed loss in nats, tokens that count in it)."""
    order = sorted(range(len(examples)), key=lambda place: (-len(examples[place].input_ids), place))
    results = [(0.0, 0)] * len(examples)
    for begin in range(0, len(order), batch):
        part = order[begin : begin + batch]
        rows = collate([examples[place] for place in part], base)
        logits, labels = logits_of(model, rows, task="causal")[:, -rows.labels.shape[1] :], rows.labels
        for row, place in enumerate(part):
            targets = labels[row, 1:]
            total = cross_entropy(logits[row, :-1].float(), targets, ignore_index=IGNORED, reduction="sum")
            results[place] = (total.item(), int((targets != IGNORED).sum()))
        check_numbers([total for total, _ in results])
        progress(min(begin + batch, len(order)))
    return results


def check_numbers(values: Sequence[float]) -> None:
    """Refuse outputs that are no numbers: the most likely of them is always the first, whatever the question.

    Raises:
        ConfigError: if one is NaN.
    """
    if any(map(isnan, values)):
        hint = "it has diverged, or overflows in its number format: load it as fp32, or look at the run's rounds"
        raise ConfigError(Fault("the model", "log-probabilities that are numbers", "NaN", hint))


def check_next(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return the scores of the next token, after refusing those that are no numbers."""
    check_numbers([float(scores.isnan().any()) and nan])
    return scores


@torch.inference_mode()
def continuations(
    model: Any,
    base: Base,
    prompts: Sequence[Sequence[int]],
    *,
    new_tokens: int,
    stop: Sequence[str] = (),
    batch: int,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress = lambda done: None,
) -> Sequence[str]:
    """Return what the model writes after each prompt, up to its end, a stop text, or so many tokens.

    Args:
        model: the base's, with or without an adapter.
        base: its tokenizer and device.
        prompts: tokens of each; the caller has checked that prompt and answer fit the base's positions.
        new_tokens: tokens of an answer at most.
        stop: texts at which an answer ends; they are not part of it.
        batch: prompts at a time.
        temperature: of sampling; 0 is greedy.
        seed: of sampling.
        progress: called after every batch.
    """
    order = sorted(range(len(prompts)), key=lambda place: (-len(prompts[place]), place))
    texts = [""] * len(prompts)
    for begin in range(0, len(order), batch):
        part = order[begin : begin + batch]
        # A key of its own for every batch: where one ends depends on the answers in it.
        with torch_seed(derive(seed, "generate", begin), base.device):
            tokens = generate(model, base, [prompts[place] for place in part], new_tokens, stop, temperature)
        for place, row in zip(part, tokens, strict=True):
            texts[place] = before_stop(base.tokenizer.decode(row, skip_special_tokens=True), stop)
        progress(min(begin + batch, len(order)))
    return texts


def generate(
    model: Any, base: Base, prompts: Sequence[Sequence[int]], new_tokens: int, stop: Sequence[str], temperature: float
) -> Sequence[Sequence[int]]:
    """Return the tokens that follow each prompt, without the end of the text and what pads it."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), base.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for number, prompt in enumerate(prompts):  # on the left: an answer continues the last column
        ids[number, longest - len(prompt) :], mask[number, longest - len(prompt) :] = torch.tensor(prompt), 1
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    out = model.generate(
        input_ids=ids.to(base.device),
        attention_mask=mask.to(base.device),
        max_new_tokens=new_tokens,
        pad_token_id=base.pad_id,
        logits_processor=LogitsProcessorList([check_next]),
        stopping_criteria=StoppingCriteriaList([StopTexts(base.tokenizer, longest, stop)]) if stop else None,
        **({"do_sample": False} | sampling),
    )
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    return [row[: next((k for k, token in enumerate(row) if token in ends), None)] for row in out[:, longest:].tolist()]


class StopTexts(StoppingCriteria):  # type: ignore[misc]  # transformers has no other way
    """Ends each row of a batch at the first of some texts."""

    def __init__(self, tokenizer: Any, start: int, texts: Sequence[str]) -> None:
        self._tokenizer, self._start, self._texts = tokenizer, start, texts
        # A text has at most as many tokens as bytes.
        self._window = max(len(text.encode()) for text in texts) + 1

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        """Return for each row whether it is over."""
        recent = input_ids[:, max(self._start, input_ids.shape[1] - self._window) :].tolist()
        texts = [self._tokenizer.decode(row) for row in recent]
        ended = [any(stop in text for stop in self._texts) for text in texts]
        return torch.tensor(ended, device=input_ids.device)


def before_stop(text: str, stop: Sequence[str]) -> str:
    """Return the text up to the first of the stop texts.

    >>> before_stop("4. Question: 5", ["Question:"])
    '4. '
    """
    places = [text.find(word) for word in stop if word in text]
    return text[: min(places)] if places else text
