from __future__ import annotations

import json
from typing import Any, cast

import pytest

from fedtune.data.rows import choose, read_parts
from fedtune.data.settings import DataSettings, Split, Task
from fedtune.data.table import from_rows
from fedtune.errors import ConfigError

TURNS: list[dict[str, Any]] = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]


def chosen(names: str, task: Task = "causal", **fields: Any) -> tuple[dict[str, str], str]:
    settings = DataSettings("x", Split("files"), fields=cast(Any, fields))
    choice = choose(settings, names.split(), "x.jsonl", task)
    return {str(part): column for part, column in choice.columns.items()}, choice.note


def refusal(names: str, task: Task = "causal", **fields: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        chosen(names, task, **fields)
    return str(caught.value)


def parts(rows: list[dict[str, Any]], **fields: Any) -> dict[str, list[str]]:
    settings = DataSettings("x", Split("files"), fields=cast(Any, fields))
    table = from_rows(rows)
    read = read_parts(choose(settings, table.names, "x.jsonl", "causal"), table, "x.jsonl")
    return {part: list(values) for part, values in read.items()}


@pytest.mark.parametrize(
    ("names", "used"),
    [
        ("text id", ["text"]),
        ("instruction output", ["instruction", "output"]),
        ("instruction input output", ["instruction", "input", "output"]),
        ("input output", ["input", "output"]),
        ("prompt completion", ["prompt", "completion"]),
        ("messages id", ["messages"]),
        ("conversations", ["conversations"]),
        ("messages tools prompt prompt_id", ["messages", "tools"]),
    ],
)
def test_rows_of_each_form_need_no_mapping(names: str, used: list[str]) -> None:
    assert list(chosen(names)[0].values()) == used
    assert chosen(names)[1] == ""


def test_a_column_beside_those_that_are_used_is_noted_and_not_taken() -> None:
    columns, note = chosen("instruction input output text")
    assert "text" not in columns
    assert note.startswith("data.fields: rows are read from instruction, input, output; not used: text")
    columns, note = chosen("text input label", "classification")
    assert columns == {"text": "text", "label": "label"}
    assert note.startswith("data.fields: rows are read from text, label; not used: input")
    assert chosen("text input", "causal")[0] == {"text": "text"}
    assert "not used: system" in chosen("conversations system")[1]
    assert chosen("messages output")[1].endswith("not used: output (map it with data.fields if it is meant)")


def test_what_is_mapped_comes_first() -> None:
    assert chosen("text output", text="text")[0] == {"text": "text"}
    assert chosen("messages q a", instruction="q", output="a")[0] == {"instruction": "q", "output": "a"}
    assert chosen("talk text", messages="talk")[0] == {"messages": "talk"}
    assert chosen("prompt completion best", output="best", instruction="prompt")[0]["output"] == "best"
    pair = chosen("text other label", "classification", input="other")[0]
    assert pair == {"text": "text", "input": "other", "label": "label"}
    assert list(chosen("instruction input label", "classification")[0]) == ["instruction", "input", "label"]


def test_rows_of_no_form_are_refused_with_the_columns_that_there_are() -> None:
    text = refusal("question answer")
    assert text.startswith(
        "data.fields.output: expected a column for output, or one for text, or one for messages; got"
    )
    assert "got question, answer in x.jsonl; a row is one of messages (or conversations); instruction" in text
    assert refusal("text", output="answer").startswith(
        "data.fields.output: expected column 'answer'; got text in x.jsonl"
    )
    assert "data.fields.label: expected a column for label, which classification needs; got text, lable in x.jsonl" in (
        refusal("text lable", "classification")
    )
    assert "data.fields.messages: expected no entry for classification" in (
        refusal("label text talk", "classification", messages="talk")
    )
    assert refusal("label q", "classification").startswith("data.fields.text: expected a column for text")
    assert "data.fields.text: expected columns of one form of row; got output and text" in (
        refusal("a b", output="a", text="b")
    )


def test_prompts_and_completions_may_be_turns() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": [TURNS[0]], "completion": [TURNS[1]]},
        {"prompt": "hi", "completion": [TURNS[1]]},
    ]
    read = parts(rows)
    assert [json.loads(text) for text in read["messages"]] == [TURNS, TURNS]
    assert parts([{"prompt": "hi", "completion": "yes"}]) == {"instruction": ["hi"], "output": ["yes"]}


def test_a_turn_that_is_none_is_refused_by_row() -> None:
    rows: list[dict[str, Any]] = [
        {"conversations": TURNS},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": ""}]},
    ]
    with pytest.raises(ConfigError) as caught:
        parts(rows)
    assert str(caught.value) == (
        "data.fields.messages: expected a list of turns, each with its role and its text; "
        "got no text as turn 2 (gpt) in row 2 of column 'conversations' of x.jsonl"
    )


def test_tools_are_lists_of_schemas_or_nothing() -> None:
    schema = [{"type": "function", "function": {"name": "add"}}]
    rows = [{"messages": TURNS, "tools": tools} for tools in (schema, json.dumps(schema), None, "", [])]
    assert parts(rows)["tools"] == [json.dumps(schema)] * 2 + [""] * 3
    other = [{"type": "function", "function": {"name": "add", "of another row": None}}]
    assert parts([{"messages": TURNS, "tools": other}])["tools"] == [json.dumps(schema)]
    with pytest.raises(ConfigError, match=r"data\.fields\.tools: expected a list of JSON schemas.*'add' in row 1"):
        parts([{"messages": TURNS, "tools": "add"}])
