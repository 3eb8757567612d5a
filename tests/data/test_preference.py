from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fedtune.data.encode import IGNORED, Example, encode_causal
from fedtune.data.federation import digest, federate
from fedtune.data.limits import all_examples
from fedtune.data.preference import encode_preferences, holds_preferences, shared_tokens
from fedtune.data.settings import DataSettings, Split
from fedtune.errors import ConfigError

SETTINGS = DataSettings("x", Split("files"), template="plain")


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    return AutoTokenizer.from_pretrained(stories)


def encoded(tokenizer: Any, settings: DataSettings = SETTINGS, **rows: list[str]) -> Any:
    return encode_preferences(rows, settings, tokenizer, place=lambda row: f"row {row + 1} of x")


def learned(example: Example) -> list[int]:
    labels = np.asarray(example.labels)
    return [int(token) for token in labels[labels != IGNORED]]


def test_an_example_holds_both_answers_as_each_alone_would_be_encoded(tokenizer: Any) -> None:
    [example] = encoded(tokenizer, instruction=["Who came?"], output=["The cat."], rejected=["A dog."]).examples
    for answer, own in (("The cat.", example), ("A dog.", example.rejected)):
        [alone] = encode_causal({"instruction": ["Who came?"], "output": [answer]}, SETTINGS, tokenizer).examples
        assert alone is not None
        assert own.input_ids.tolist() == alone.input_ids.tolist()
        assert learned(own) == learned(alone)
    assert (example.reference, example.prompt) == ("The cat.", "Who came?\n")
    assert holds_preferences([example])
    assert not holds_preferences([replace(example, rejected=None)])


def test_what_both_answers_begin_with_counts_in_neither(tokenizer: Any) -> None:
    [example] = encoded(tokenizer, instruction=["x"], output=["I saw the cat"], rejected=["I saw the dog run"]).examples
    common = shared_tokens(example.input_ids, example.rejected.input_ids)
    for own in (example, example.rejected):
        assert (np.asarray(own.labels)[:common] == IGNORED).all()
        assert learned(own) == own.input_ids[common:].tolist()
        assert learned(own)[-1] == tokenizer.eos_token_id


CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_conversations_are_compared_from_the_turn_in_which_they_differ(stories: Path) -> None:
    """Earlier turns of the assistant are the prompt of both; what follows a turn that differs counts too."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = CHAT
    shared = [("user", "Hi"), ("assistant", "Hello"), ("user", "Who came?")]
    answers = ([("assistant", "The cat")], [("assistant", "A dog"), ("user", "Which?"), ("assistant", "Mine")])
    texts = [json.dumps([{"role": role, "content": text} for role, text in [*shared, *own]]) for own in answers]
    settings = replace(SETTINGS, template="chat")
    [example] = encoded(tokenizer, settings, messages=[texts[0]], rejected=[texts[1]]).examples
    shown = [tokenizer.decode(learned(own)) for own in (example, example.rejected)]
    assert "Hello" not in "".join(shown)
    assert "The cat" in shown[0]
    assert "A dog" in shown[1]
    assert "Mine" in shown[1]
    assert "Which?" not in shown[1]


def test_conversations_without_an_answer_are_counted(stories: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(stories)
    tokenizer.chat_template = CHAT
    asked = json.dumps([{"role": "user", "content": "Hi"}])
    result = encoded(tokenizer, replace(SETTINGS, template="chat"), messages=[asked], rejected=[asked])
    assert (result.examples, result.unanswered) == ([None], 1)


@given(st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6))
def test_shared_tokens_are_the_longest_common_start(first: list[int], second: list[int]) -> None:
    count = shared_tokens(np.array(first, np.int64), np.array(second, np.int64))
    assert first[:count] == second[:count]
    assert count == min(len(first), len(second)) or first[count] != second[count]


def test_whole_texts_end_and_differ_from_where_they_differ(tokenizer: Any) -> None:
    [example] = encoded(tokenizer, text=["Once upon a time"], rejected=["Once upon a time there"]).examples
    assert learned(example) == [tokenizer.eos_token_id]
    assert learned(example.rejected)[-1] == tokenizer.eos_token_id


def test_equal_answers_and_answers_that_were_cut_alike_are_dropped_and_counted(tokenizer: Any) -> None:
    rows = {
        "instruction": ["a", "b", "c " * 40, "d"],
        "output": ["same", "one", "one", "the very same start and then a cat"],
        "rejected": ["same", "two", "two", "the very same start and then a dog"],
    }
    short = replace(SETTINGS, max_tokens=8)
    result = encoded(tokenizer, short, **rows)
    assert [example is not None for example in result.examples] == [False, True, False, False]
    assert list(result.equal) == ["row 1 of x"]


def test_packing_and_pairs_exclude_each_other(tokenizer: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.packing: expected false for rows with rejected answers"):
        encoded(tokenizer, replace(SETTINGS, packing=True), text=["a"], rejected=["b"])


def federation(tmp_path: Path, tokenizer: Any, rows: list[dict[str, str]], **options: Any) -> Any:
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DataSettings("x.jsonl", Split("iid", clients=1), template="plain", **options)
    return federate(settings, tokenizer=tokenizer, task="causal", seed=0, root=tmp_path)


def test_a_federation_knows_that_its_rows_are_compared_and_digests_both_answers(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"p{row}", "chosen": f"yes {row}", "rejected": f"no {row}"} for row in range(6)]
    first = federation(tmp_path, tokenizer, rows)
    assert first.compared
    assert len(list(all_examples(first))) == 2 * sum(
        1 for _ in [*first.clients["client-0"].train, *first.test]
    ) + 2 * len(first.clients["client-0"].held_out)
    other = federation(tmp_path, tokenizer, [{**row, "rejected": row["rejected"] + "!"} for row in rows])
    assert digest(first) != digest(other)


def test_dropped_pairs_are_in_the_notes_with_the_row(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": f"p{row}", "chosen": f"yes {row}", "rejected": f"no {row}"} for row in range(5)]
    rows[3]["rejected"] = rows[3]["chosen"]
    notes = " ".join(federation(tmp_path, tokenizer, rows).notes)
    assert "1 of 5 rows have equal answers as chosen and rejected (row 4 of" in notes
    with pytest.raises(ConfigError, match=r"at least one training example.*5 rows, each with equal answers"):
        federation(tmp_path, tokenizer, [{**row, "rejected": row["chosen"]} for row in rows])
