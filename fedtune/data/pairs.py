"""Rows with a preferred and a rejected answer, as people store them: texts or conversations, with or without prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedtune.data.conversation import ROLES, ConversationError, from_prompt, read_turns, write_turns
from fedtune.data.settings import Part
from fedtune.errors import ConfigError, Fault

BOTH: Sequence[Part] = ("chosen", "rejected")
"""The parts of a row whose answers are compared."""


def holds_turns(columns: Mapping[Part, Sequence[Any]]) -> bool:
    """Return whether the answers are turns of a conversation, as the first row has them."""
    return any(isinstance(value, list) for part in BOTH for value in columns[part][:1])


def read_pairs(columns: Mapping[Part, Sequence[Any]], places: Mapping[Part, str]) -> Mapping[str, Sequence[str]]:
    """Return conversations with either answer, as JSON: `messages` with the preferred one, and `rejected`.

    A column of prompts stands before both answers, unless these are whole conversations already. Without it the prompt
    is what both begin with.

    Args:
        columns: `chosen` and `rejected`, and `instruction` if there are prompts.
        places: by part, its column and file, for messages.

    Raises: ConfigError naming the first row whose answers are none, or do not answer the same prompt.
    """
    prompts = columns.get("instruction", [None] * len(columns["chosen"]))
    read: dict[str, list[str]] = {"messages": [], "rejected": []}
    for row, (prompt, chosen, rejected) in enumerate(zip(prompts, columns["chosen"], columns["rejected"], strict=True)):
        texts = [_turns(part, prompt, own, row, places) for part, own in zip(BOTH, (chosen, rejected), strict=True)]
        first, second = map(read_turns, texts)
        if first[0] != second[0] or first[0]["role"] == "assistant":
            got = f"others in row {row + 1} of {places['rejected']}"
            hint = "give both the same turns before the answer, or map instruction to the column of the prompts"
            raise ConfigError(Fault("data.fields.rejected", "two answers to one prompt in every row", got, hint))
        for part, text in zip(read, texts, strict=True):
            read[part].append(text)
    return read


def _turns(part: Part, prompt: Any, answer: Any, row: int, places: Mapping[Part, str]) -> str:
    """Return a prompt with an answer as a conversation in JSON; nothing may be empty."""
    expected = "a text or turns of a conversation in every row"
    try:
        if isinstance(answer, str) and not answer.strip():
            raise ConversationError("an empty text")
        whole = isinstance(answer, list) and bool(answer) and not _is_answer(answer[0])
        if prompt is None and not isinstance(answer, list):
            raise ConversationError("nothing" if answer is None else f"{str(answer)[:40]!r} without a prompt")
        return write_turns(answer if prompt is None or whole else from_prompt(prompt, answer))
    except ConversationError as error:
        got = f"{error} in row {row + 1} of {places[part]}"
        hint = "fill or remove these rows: every row needs a preferred and a rejected answer"
        raise ConfigError(Fault(f"data.fields.{part}", expected, got, hint)) from error


def _is_answer(turn: Any) -> bool:
    name = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    return isinstance(name, str) and ROLES.get(name.strip().lower()) == "assistant"
