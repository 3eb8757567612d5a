from __future__ import annotations

import json
from typing import Any, cast

import pytest

from fedtune.data.rows import choose, read_parts
from fedtune.data.settings import DataSettings, Split
from fedtune.data.table import from_rows
from fedtune.errors import ConfigError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def parts(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    settings = DataSettings("x", Split("files"), fields=cast(Any, fields))
    table = from_rows(rows)
    read = read_parts(choose(settings, table.names, "x.jsonl", "causal"), table, "x.jsonl")
    return {part: list(values) for part, values in read.items()}


def turns(rows: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    read = parts(rows, **fields)
    return {part: [[turn["content"] for turn in json.loads(text)] for text in texts] for part, texts in read.items()}


def refusal(rows: list[dict[str, Any]], **fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parts(rows, **fields)
    return str(caught.value)


def test_a_prompt_and_two_texts_are_an_instruction_with_two_outputs() -> None:
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    expected = {"instruction": ["Why?"], "output": ["Because."], "rejected": ["No."]}
    assert parts([row]) == expected
    named = {"question": "Why?", "good": "Because.", "bad": "No."}
    assert parts([named], instruction="question", chosen="good", rejected="bad") == expected


def test_two_texts_without_a_prompt_are_whole_texts() -> None:
    assert parts([{"chosen": "a b", "rejected": "a c"}]) == {"text": ["a b"], "rejected": ["a c"]}


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": [user("Why?"), bot("Because.")], "rejected": [user("Why?"), bot("No.")]},
        {"prompt": [user("Why?")], "chosen": [bot("Because.")], "rejected": [bot("No.")]},
        {"prompt": "Why?", "chosen": [bot("Because.")], "rejected": [bot("No.")]},
        # As in UltraFeedback: the prompt stands in a column of its own and in both conversations.
        {"prompt": "Why?", "chosen": [user("Why?"), bot("Because.")], "rejected": [user("Why?"), bot("No.")]},
        {
            "chosen": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}],
            "rejected": [user("Why?"), bot("No.")],
        },
    ],
    ids=["implicit", "explicit", "text before turns", "prompt twice", "ShareGPT"],
)
def test_conversations_come_with_or_without_their_prompt(row: dict[str, Any]) -> None:
    assert turns([row]) == {"messages": [["Why?", "Because."]], "rejected": [["Why?", "No."]]}


def test_a_table_of_conversations_is_read_as_such_unless_pairs_are_asked_for() -> None:
    row = {"messages": [user("a"), bot("b")], "chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]}
    assert "rejected" not in parts([row])
    assert turns([row], chosen="chosen", rejected="rejected")["rejected"] == [["a", "c"]]


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (
            {"chosen": "a", "rejected": None},
            ["data.fields.rejected", "row 2 of column 'rejected' of x.jsonl", "fill or remove"],
        ),
        ({"chosen": "a", "rejected": " "}, ["data.fields.rejected", "row 2 of column 'rejected'"]),
        ({"chosen": None, "rejected": "b"}, ["data.fields.chosen", "row 2 of column 'chosen'"]),
    ],
)
def test_a_row_without_one_of_the_answers_is_refused_by_name(bad: dict[str, Any], words: list[str]) -> None:
    text = refusal([{"prompt": "p", "chosen": "a", "rejected": "b"}, {"prompt": "p", **bad}])
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"chosen": [user("a"), bot("b")], "rejected": None}, ["data.fields.rejected", "nothing in row 2"]),
        ({"chosen": [user("a"), bot("b")], "rejected": []}, ["data.fields.rejected", "no turn in row 2"]),
        ({"chosen": [user("a"), bot("b")], "rejected": ""}, ["data.fields.rejected", "an empty text in row 2"]),
        ({"chosen": [user("a"), bot("b")], "rejected": "b"}, ["data.fields.rejected", "'b' without a prompt in row 2"]),
        ({"chosen": [user("a"), bot("b")], "rejected": [user("z"), bot("c")]}, ["two answers to one prompt", "row 2"]),
        ({"chosen": [bot("b")], "rejected": [bot("c")]}, ["two answers to one prompt", "row 2"]),
    ],
)
def test_conversations_that_are_no_pair_are_refused_by_name(bad: dict[str, Any], words: list[str]) -> None:
    text = refusal([{"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("c")]}, bad])
    assert all(word in text for word in words), text


def test_both_columns_must_be_there_and_no_other_form_of_row_be_mapped() -> None:
    assert "expected a column for rejected" in refusal([{"chosen": "a", "text": "b"}], chosen="chosen")
    both = {"chosen": "a", "rejected": "b", "text": "c"}
    assert "columns of one form of row; got rejected and text" in refusal([both], rejected="rejected", text="text")
