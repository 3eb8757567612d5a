from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fedtune.errors import ConfigError
from fedtune.model.edge_tokenizer import CHAT_TEMPLATE, CONFIG, TOKENIZER, tokenizer_files
from fedtune.runs.tokenizer_check import check_tokenizer

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_what_was_written_is_read_alike(tokenizer: Any) -> None:
    check_tokenizer(tokenizer, tokenizer_files(tokenizer))


def test_another_template_post_processor_or_end_is_refused(tokenizer: Any) -> None:
    files = tokenizer_files(tokenizer)
    bare = json.loads(files[TOKENIZER]) | {"normalizer": None}
    config = json.loads(files[CONFIG])
    config["special_tokens"]["eos_token"] = "<s>"
    for wrong in (
        {TOKENIZER: json.dumps(bare).encode()},
        {CONFIG: json.dumps(config).encode()},
        {CHAT_TEMPLATE: TEMPLATE.replace("</s>", "").encode()},
    ):
        with pytest.raises(ConfigError, match=r"model\.base: expected a tokenizer that a device reads alike"):
            check_tokenizer(tokenizer, {**files, **wrong})
    with pytest.raises(ConfigError, match="chat template"):
        check_tokenizer(AutoTokenizer.from_pretrained(tokenizer.name_or_path), files)
