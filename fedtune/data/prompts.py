"""From the turns of a conversation to the tokens that a model continues."""

from __future__ import annotations

from collections.abc import Sequence

from fedtune.data.encode import Tokenizer, prompt_text
from fedtune.data.settings import DataSettings, Form
from fedtune.data.templates import Message


def open_ids(tokenizer: Tokenizer, text: str, *, special: bool) -> Sequence[int]:
    """Return the tokens of a prompt, open at the end.

    Args:
        tokenizer: the base's.
        text: of the prompt.
        special: whether the tokenizer adds its own special tokens; a chat template has written them already.
    """
    ids: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    # Some tokenizers close every text; a prompt stays open.
    return ids[:-1] if special and len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def conversation_ids(
    turns: Sequence[Message],
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    form: Form,
    positions: int,
    new_tokens: int,
) -> Sequence[int]:
    """Return the tokens of a conversation, without its oldest exchanges where all of it leaves no room to answer.

    Args:
        turns: the last is the question.
        settings: the recipe's table `data`.
        tokenizer: the base's.
        form: of the rows that the model was trained on.
        positions: longest input of the base in tokens.
        new_tokens: of the answer, at most.
    """
    recent = list(turns)
    first = 1 if recent[0]["role"] == "system" else 0
    room = positions - min(new_tokens, positions - 1)
    while True:
        text, special = prompt_text(recent, settings, tokenizer, form=form)
        ids = open_ids(tokenizer, text, special=special)
        if len(ids) <= room or len(recent) < first + 3:
            return ids
        del recent[first : first + 2]
