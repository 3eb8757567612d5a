from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.conversation import ROLES, ConversationError, from_prompt, read_turns, write_turns

HI = {"role": "user", "content": "hi"}
YES = {"role": "assistant", "content": "yes"}


def test_both_spellings_give_the_same_turns() -> None:
    hub = [{"role": "system", "content": "s"}, HI, YES, {"role": "tool", "content": "4"}]
    sharegpt = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "hi"},
        {"from": "gpt", "value": "yes"},
        {"from": "observation", "value": "4"},
    ]
    assert read_turns(write_turns(hub)) == read_turns(write_turns(sharegpt)) == hub
    assert read_turns(write_turns(json.dumps(hub))) == read_turns(write_turns({"messages": hub})) == hub


def test_what_templates_read_beside_the_text_stays_and_the_rest_goes() -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "add"}}],
        "score": 3,
        "name": None,
    }
    (turn,) = read_turns(write_turns([call]))
    assert turn == {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add"}}]}


def test_arguments_of_a_call_are_an_object_that_templates_write_once() -> None:
    def called(arguments: object) -> object:
        call = {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }
        (turn,) = read_turns(write_turns([call]))
        return turn["tool_calls"][0]["function"]["arguments"]

    assert called('{"a": 1, "b": null}') == {"a": 1, "b": None}
    assert called({"a": 1, "of another row": None}) == {"a": 1}
    assert called("no json") == "no json"
    assert called("[1]") == "[1]"


def test_a_tool_may_answer_with_nothing() -> None:
    turns = [
        HI,
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": ""},
        YES,
    ]
    assert read_turns(write_turns(turns))[2] == {"role": "tool", "content": ""}


def test_texts_in_parts_are_joined_and_an_empty_system_turn_is_left_out() -> None:
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    assert read_turns(write_turns([{"role": "system", "content": " "}, {"role": "user", "content": parts}])) == [HI]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, "nothing"),
        (3, "an int ('3')"),
        ("no json", "text that is no JSON"),
        ([], "no turn"),
        (["hi"], "a str as turn 1"),
        ([HI, {"role": "critic", "content": "x"}], "role 'critic' (known: system, developer, user"),
        ([{"content": "x"}], "role 'None'"),
        ([HI, {"role": "assistant", "content": ""}], "no text as turn 2 (assistant)"),
        ([{"role": "user", "content": 7}], "an int that is no text ('7') as turn 1"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a list that is no text"),
        ([{"role": "user", "content": "\ud800"}], "half of a surrogate pair"),
    ],
)
def test_what_is_no_conversation_says_why(value: Any, reason: str) -> None:
    with pytest.raises(ConversationError) as caught:
        write_turns(value)
    assert reason in str(caught.value)


def test_prompt_and_completion_are_texts_or_turns() -> None:
    assert from_prompt("hi", "yes") == from_prompt([HI], [YES]) == from_prompt("hi", [YES]) == [HI, YES]


@given(
    st.lists(st.tuples(st.sampled_from(sorted(ROLES)), st.text('aé\n"{}', min_size=1).filter(str.strip)), min_size=1)
)
def test_turns_come_back(turns: list[tuple[str, str]]) -> None:
    again = read_turns(write_turns([{"role": role, "content": text} for role, text in turns]))
    assert again == [{"role": ROLES[role], "content": text} for role, text in turns]
