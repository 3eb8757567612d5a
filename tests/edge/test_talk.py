from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedtune.data.settings import DataSettings, Split
from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.edge.bundle import read_bundle
from fedtune.edge.talk import Speaker, Talk, answer, check_tuned, pieces, turn
from fedtune.edge.tokenizer import read_tokenizer
from fedtune.errors import ConfigError
from fedtune.model.edge_tokenizer import tokenizer_files
from tests.edge.bundles import write_bundle
from tests.edge.speaking import Scripted

CHAT = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[a] {% endif %}"
)


@pytest.fixture
def speaker(stories: Path, tmp_path: Path) -> Speaker:
    theirs = AutoTokenizer.from_pretrained(stories)
    theirs.chat_template = CHAT
    bundle = read_bundle(write_bundle(tmp_path / "bundle", files=tokenizer_files(theirs), positions=96))
    tokenizer = read_tokenizer(bundle)
    runtime: Any = Scripted("a little girl Größe", tokenizer)
    return Speaker(bundle, tokenizer, runtime, None, (), DataSettings("x", Split("files")), "instruction")


def prompts(speaker: Speaker) -> list[str]:
    runtime: Any = speaker.runtime
    return [speaker.tokenizer.decode(ids) for ids in runtime.prompts]


def test_an_answer_comes_in_whole_characters(speaker: Speaker) -> None:
    said = list(answer(speaker, [turn("user", "hi")], new_tokens=64))
    assert "".join(said) == "a little girl Größe"
    assert len(said) > 3
    assert not any("\ufffd" in piece for piece in said)
    assert prompts(speaker) == ["[user] hi\n[a] "]


def test_the_end_of_a_cut_character_is_still_written(speaker: Speaker) -> None:
    ids = speaker.tokenizer("漢", add_special_tokens=False)["input_ids"]
    assert len(ids) > 2
    assert "".join(pieces(speaker.tokenizer, iter(ids[:-1]))).strip() != ""
    assert list(pieces(speaker.tokenizer, iter([]))) == []


def test_a_conversation_remembers_its_turns_until_it_is_reset(speaker: Speaker) -> None:
    talk = Talk(speaker, system="be brief", new_tokens=8)
    first = "".join(talk.ask("one"))
    list(talk.ask("two"))
    assert prompts(speaker)[1] == f"[system] be brief\n[user] one\n[assistant] {first}\n[user] two\n[a] "
    talk.reset()
    list(talk.ask("three"))
    assert prompts(speaker)[2] == "[system] be brief\n[user] three\n[a] "


def test_what_was_said_before_an_answer_was_stopped_counts(speaker: Speaker) -> None:
    talk = Talk(speaker, system=None, new_tokens=16)
    answering = talk.ask("one")
    first = next(answering)
    answering.close()  # type: ignore[attr-defined]
    list(talk.ask("two"))
    assert f"[assistant] {first}\n[user] two" in prompts(speaker)[1]


def test_rows_of_plain_text_have_no_place_for_earlier_turns(speaker: Speaker) -> None:
    plain = replace(speaker, form="text")
    talk = Talk(plain, system=None, new_tokens=4)
    list(talk.ask("Once upon"))
    list(talk.ask("a time"))
    assert prompts(plain) == ["<s> Once upon", "<s> a time"]


def test_a_long_prompt_keeps_its_end_and_room_for_the_answer(speaker: Speaker) -> None:
    plain = replace(speaker, form="text")
    list(answer(plain, [turn("user", "once upon " * 60 + "the end")], new_tokens=500))
    runtime: Any = plain.runtime
    assert (len(runtime.prompts[0]), runtime.asked[0][2]) == (1, 95)
    list(answer(plain, [turn("user", "once upon " * 60 + "the end")], new_tokens=16))
    assert len(runtime.prompts[1]) == 80
    assert prompts(plain)[1].endswith("the end")
    list(answer(plain, [turn("user", "")], new_tokens=4))
    assert runtime.prompts[2] == [plain.tokenizer.bos_token_id]


def test_the_tuned_model_is_asked_with_its_seeds_and_those_of_another_base_are_refused(speaker: Speaker) -> None:
    ledger = SeedLedger(Kron(4, 0), 12, 1, speaker.bundle.manifest.digest, np.ones(4, np.int32))
    check_tuned(speaker.bundle, ledger)
    tuned = replace(speaker, ledger=ledger, trainable=(0,))
    list(answer(tuned, [turn("user", "hi")], new_tokens=4))
    runtime: Any = tuned.runtime
    assert runtime.asked == [(ledger, (0,), 4)]
    with pytest.raises(ConfigError, match="use the bundle that the model was tuned on, or --base"):
        check_tuned(speaker.bundle, replace(ledger, manifest=b"m" * 32))
