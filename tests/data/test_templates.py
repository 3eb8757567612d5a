from __future__ import annotations

from typing import Any

import pytest

from fedtune.data.settings import DataSettings, Split
from fedtune.data.templates import prompt_of, render, template_of
from fedtune.errors import ConfigError


class Tokenizer:
    """A tokenizer that has nothing but a chat template, whose text or whose error it gives."""

    def __init__(self, chat_template: str | None, answer: str | Exception = "") -> None:
        self.chat_template, self.answer = chat_template, answer

    def get_chat_template(self, chat_template: Any = None, tools: Any = None) -> Any:
        return self.chat_template

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def settings(template: str) -> DataSettings:
    return DataSettings("x", Split("files"), template=template)


def test_auto_is_the_chat_template_where_there_is_one() -> None:
    assert template_of(DataSettings("x", Split("files")), Tokenizer("{{ x }}")) == "chat"
    assert template_of(settings("auto"), Tokenizer(None)) == "alpaca"
    assert template_of(settings("plain"), Tokenizer("{{ x }}")) == "plain"


def test_the_refusal_of_a_missing_chat_template_names_those_that_there_are() -> None:
    with pytest.raises(ConfigError, match=r'data\.template: .* no chat template; got \'chat\'; use "alpaca", "plain"'):
        template_of(settings("chat"), Tokenizer(None))


def test_an_input_decides_between_the_two_alpaca_prompts() -> None:
    assert "### Input" not in prompt_of("alpaca", "a", "")
    assert prompt_of("alpaca", "a", "b").endswith("### Instruction:\na\n\n### Input:\nb\n\n### Response:")


@pytest.mark.parametrize(
    "error", [TypeError("no"), ValueError("no"), KeyError("no"), AttributeError("no"), RecursionError("no")]
)
def test_whatever_a_chat_template_raises_is_one_error_with_its_words(error: Exception) -> None:
    turns = [{"role": "tool", "content": "x"}]
    with pytest.raises(ConfigError, match=r"data\.template: .*; got .*no.* from it for row 7 of a\.jsonl \(tool\);"):
        render(turns, Tokenizer("{{ x }}", error), place="row 7 of a.jsonl")
