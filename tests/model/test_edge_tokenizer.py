from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from fedtune.errors import ConfigError
from fedtune.model.edge_tokenizer import CHAT_TEMPLATE, CONFIG, TOKENIZER, tokenizer_files


def test_files_hold_the_tokenizer_as_it_is_in_use(stories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    files = tokenizer_files(tokenizer)
    assert sorted(files) == [TOKENIZER, CONFIG]
    assert Tokenizer.from_str(files[TOKENIZER].decode()).encode("Once").ids == tokenizer("Once")["input_ids"]
    config = json.loads(files[CONFIG])
    assert (config["eos_token"], config["special_tokens"]["bos_token"]) == ("</s>", "<s>")
    assert tokenizer_files(tokenizer) == files
    tokenizer.chat_template = "{{ messages }}ü"
    assert tokenizer_files(tokenizer)[CHAT_TEMPLATE].decode() == "{{ messages }}ü"
    tokenizer.chat_template = {"default": "a", "tool_use": "b"}
    more = tokenizer_files(tokenizer)
    assert CHAT_TEMPLATE not in more
    assert json.loads(more[CONFIG])["chat_template"] == [
        {"name": "default", "template": "a"},
        {"name": "tool_use", "template": "b"},
    ]


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match=r"expected a fast tokenizer .* got Slow"):
        tokenizer_files(Slow())
