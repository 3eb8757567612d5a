from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fedtune.data.prompts import conversation_ids, open_ids
from fedtune.data.settings import DataSettings, Split
from fedtune.runs.chat import turn

TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
SETTINGS = DataSettings("x", Split("files"))


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def text_of(tokenizer: Any, turns: list[Any], *, positions: int = 512) -> str:
    ids = conversation_ids(turns, SETTINGS, tokenizer, form="instruction", positions=positions, new_tokens=16)
    assert len(ids) <= positions - 16
    text: str = tokenizer.decode(ids)
    return text


def test_a_conversation_that_grows_too_long_forgets_its_oldest_exchanges(tokenizer: Any) -> None:
    turns = [turn("system", "be brief")]
    for number in range(40):
        turns += [turn("user", f"question {number} once"), turn("assistant", "a time")]
    turns.append(turn("user", "the last"))
    text = text_of(tokenizer, turns)
    assert text.startswith("[system] be brief\n[user] question")
    assert text.endswith("[user] the last\n[assistant] ")
    assert "question 0 " not in text
    assert "question 39 " in text
    assert "question 0 " in text_of(tokenizer, turns[:4])


def test_a_question_alone_is_never_left_out(tokenizer: Any) -> None:
    long = turn("user", "once " * 50)
    ids = conversation_ids([long], SETTINGS, tokenizer, form="instruction", positions=32, new_tokens=8)
    assert len(ids) > 32  # what runs it takes the end of it


def test_a_prompt_stays_open_where_a_tokenizer_closes_every_text(stories: Path) -> None:
    closing = AutoTokenizer.from_pretrained(stories, add_bos_token=True, add_eos_token=True)
    assert closing("once")["input_ids"][-1] == closing.eos_token_id
    assert open_ids(closing, "once", special=True) == closing("once")["input_ids"][:-1]
    assert open_ids(closing, "", special=False) == []
