"""From rows with a preferred and a rejected answer to examples that hold both."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from fedtune.data.encode import IGNORED, Encoded, Example, Ids, Tokenizer, encode_causal
from fedtune.data.settings import DataSettings
from fedtune.errors import ConfigError, Fault


def holds_preferences(examples: Iterable[Example]) -> bool:
    """Return whether examples hold rejected answers; those of one source all do, or none does."""
    return any(example.rejected is not None for example in examples)


def encode_preferences(
    rows: Mapping[str, Sequence[str]], settings: DataSettings, tokenizer: Tokenizer, *, place: Callable[[int], str]
) -> Encoded:
    """Return one example per row, with the rejected answer in `Example.rejected`; None where nothing is to be compared.

    Both answers stand behind the same prompt, written and cut as every answer is. The tokens that both begin with, the
    prompt's among them, count in neither: their probabilities are equal, and in the difference they would cancel.

    Args:
        rows: by part, the rows' texts; `rejected` replaces the output, the conversation or the whole text.
        settings: the recipe's table `data`.
        tokenizer: the base's.
        place: from a row's number to where it was read, for messages.

    Raises: ConfigError as `encode_causal`, and if packing is asked for.
    """
    if settings.packing:
        expected = "false for rows with rejected answers, of which each is compared by itself"
        raise ConfigError(Fault("data.packing", expected, "true", "leave it out"))
    answer = next(part for part in ("messages", "output", "text") if part in rows)
    first = {part: texts for part, texts in rows.items() if part != "rejected"}
    second = {**first, answer: rows["rejected"]}
    # Plain texts end with the end-of-sequence token only where others follow; that an answer ends is part of it.
    ended = replace(settings, packing=True, loss_on="completion")
    chosen, rejected = (encode_causal(texts, ended, tokenizer, place=place) for texts in (first, second))
    answers = zip(rows[answer], rows["rejected"], strict=True)
    return Encoded(
        # Equal answers share all their tokens, and are None already.
        [_pair(first, second) for first, second in zip(chosen.examples, rejected.examples, strict=True)],
        prompt_tokens=chosen.prompt_tokens,
        tokens=np.maximum(chosen.tokens, rejected.tokens),
        unanswered=int(np.count_nonzero((chosen.tokens == 0) | (rejected.tokens == 0))),
        equal=[place(row) for row, (preferred, other) in enumerate(answers) if preferred == other],
    )


def _pair(chosen: Example | None, rejected: Example | None) -> Example | None:
    """Return an example with both answers; None where one is lost, or they differ only in what was cut off."""
    if chosen is None or rejected is None:
        return None
    common = shared_tokens(chosen.input_ids, rejected.input_ids)
    labels = [_without(np.asarray(answer.labels), common) for answer in (chosen, rejected)]
    if not all((own != IGNORED).any() for own in labels):
        return None
    return replace(chosen, labels=labels[0], rejected=replace(rejected, labels=labels[1]))


def shared_tokens(first: Ids, second: Ids) -> int:
    """Return with how many tokens both texts begin.

    >>> shared_tokens(np.array([1, 5, 6]), np.array([1, 5, 7, 8]))
    2
    """
    length = min(len(first), len(second))
    different = np.flatnonzero(first[:length] != second[:length])
    return int(different[0]) if len(different) else length


def _without(labels: Ids, count: int) -> Ids:
    """Return labels of which so many from the start are not in the loss."""
    return np.concatenate([np.full(count, IGNORED, np.int64), labels[count:]])
