from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from fedtune.data.chat import write_conversation
from fedtune.data.conversation import write_turns
from fedtune.data.encode import IGNORED, Encoded, encode_causal
from fedtune.data.settings import DataSettings, Split
from fedtune.data.templates import DAY, clock
from fedtune.errors import ConfigError

CHATML = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
# As Qwen3's: reasoning stands in the last turn only.
THINKING = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}<think>\n</think>{% endif %}"
    "{{ m.content }}</s>\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Once"},
    {"role": "assistant", "content": "upon a time"},
    {"role": "user", "content": "there"},
    {"role": "assistant", "content": "was a dog"},
]


@pytest.fixture(scope="module")
def make(stories: Path) -> Any:
    def with_template(template: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(stories)
        tokenizer.chat_template = template
        return tokenizer

    return with_template


def pieces(tokenizer: Any, turns: list[dict[str, Any]], **options: Any) -> list[str]:
    options = {"place": "row 1", "date": DAY, **options}
    conversation = write_conversation(turns, tokenizer, **options)
    return [conversation.text[answer.begin : answer.end] for answer in conversation.answers]


def encode(tokenizer: Any, *conversations: list[dict[str, Any]], **options: Any) -> Encoded:
    rows = {"messages": [write_turns(turns) for turns in conversations]}
    return encode_causal(rows, DataSettings("x", Split("files"), **options), tokenizer)


def test_every_turn_of_the_assistant_is_learned_with_the_marks_that_close_it(make: Any) -> None:
    assert pieces(make(CHATML), TURNS) == ["upon a time</s>\n", "was a dog</s>\n"]
    assert pieces(make(THINKING), TURNS) == ["upon a time</s>\n", "<think>\n</think>was a dog</s>\n"]


def test_reasoning_that_a_template_leaves_out_of_earlier_turns_is_left_out(make: Any) -> None:
    thoughts = [{**turn, "content": f"<think>\nhm\n</think>\n\n{turn['content']}"} for turn in TURNS]
    turns = [thought if turn["role"] == "assistant" else turn for turn, thought in zip(TURNS, thoughts, strict=True)]
    template = CHATML.replace(
        "m.content }}", "m.content.split('</think>')[-1].strip() if not loop.last else m.content }}"
    )
    assert pieces(make(template), turns) == ["upon a time</s>\n", "<think>\nhm\n</think>\n\nwas a dog</s>\n"]
    conversation = write_conversation(turns, make(template), place="row 1", date=DAY)
    assert conversation.answers[0].reference == "upon a time"


def test_the_template_s_own_marks_come_first(make: Any) -> None:
    assert pieces(make(MARKED), TURNS) == ["upon a time</s>", "was a dog</s>"]
    conversation = write_conversation(TURNS, make(MARKED), place="row 1", date=DAY)
    assert [answer.reference for answer in conversation.answers] == ["upon a time", "was a dog"]


def test_the_learned_tokens_are_those_that_transformers_marks(make: Any) -> None:
    tokenizer = make(MARKED)
    (example,) = encode(tokenizer, TURNS).examples
    stock = tokenizer.apply_chat_template(
        TURNS, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, add_generation_prompt=False
    )
    assert example is not None
    assert example.input_ids.tolist() == stock["input_ids"]
    assert (np.asarray(example.labels) != IGNORED).tolist() == [bool(counts) for counts in stock["assistant_masks"]]
    assert example.characters == len("upon a time</s>was a dog</s>")


def test_boundaries_learn_what_marks_learn_but_for_the_line_break_after_a_turn(make: Any) -> None:
    (marked,), (plain,) = (encode(make(template), TURNS).examples for template in (MARKED, CHATML))
    assert marked is not None
    assert plain is not None
    assert marked.input_ids.tolist() == plain.input_ids.tolist()
    differ = np.asarray(marked.labels) != np.asarray(plain.labels)
    tokens = make(CHATML).convert_ids_to_tokens(plain.input_ids[differ])
    assert set(tokens) == {"<0x0A>", "▁"}  # this tokenizer puts a space after each special token


def test_the_last_answer_that_is_left_is_the_one_to_generate(make: Any) -> None:
    tokenizer = make(CHATML)
    (example,) = encode(tokenizer, TURNS).examples
    assert example is not None
    assert example.reference == "was a dog"
    assert example.prompt.endswith("<user>there</s>\n<assistant>")
    prompt = example.input_ids[: example.prompt_tokens].tolist()
    assert prompt == tokenizer(example.prompt, add_special_tokens=False)["input_ids"]
    encoded = encode(tokenizer, TURNS, max_tokens=example.prompt_tokens)
    (cut,) = encoded.examples
    assert cut is not None
    assert cut.reference == "upon a time"
    assert encoded.tokens[0] > example.prompt_tokens
    (gone,) = encode(tokenizer, TURNS, max_tokens=int(encoded.prompt_tokens[0])).examples
    assert gone is None


def test_turns_after_the_last_answer_and_a_greeting_are_not_learned(make: Any) -> None:
    tokenizer = make(CHATML)
    assert pieces(tokenizer, [*TURNS, {"role": "user", "content": "Bye"}]) == pieces(tokenizer, TURNS)
    assert pieces(tokenizer, [{"role": "assistant", "content": "Hi"}, *TURNS[1:3]]) == ["upon a time</s>\n"]


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_turn_of_weight_0_is_read_and_not_learned(make: Any, template: str) -> None:
    turns = [*TURNS[:2], {**TURNS[2], "weight": 0}, *TURNS[3:]]
    assert pieces(make(template), turns) == ["was a dog</s>\n"]


def test_conversations_without_an_answer_are_counted(make: Any) -> None:
    encoded = encode(make(CHATML), TURNS, TURNS[:2], [TURNS[2]])
    assert [example is None for example in encoded.examples] == [False, True, True]
    assert encoded.unanswered == 2


def test_loss_on_all_learns_the_whole_conversation(make: Any) -> None:
    (example,) = encode(make(CHATML), TURNS, loss_on="all").examples
    assert example is not None
    assert np.asarray(example.labels)[1:].tolist() == example.input_ids[1:].tolist()


def test_a_single_exchange_is_the_same_as_instruction_and_output(make: Any) -> None:
    tokenizer = make(CHATML)
    (talk,) = encode(tokenizer, TURNS[1:3]).examples
    (row,) = encode_causal(
        {"instruction": ["Once"], "output": ["upon a time"]}, DataSettings("x", Split("files")), tokenizer
    ).examples
    assert talk is not None
    assert row is not None
    assert talk.input_ids.tolist() == row.input_ids.tolist()
    assert np.array_equal(talk.labels, row.labels)
    assert (talk.prompt, talk.reference, talk.prompt_tokens) == (row.prompt, row.reference, row.prompt_tokens)


def test_a_template_that_rewrites_earlier_turns_is_refused_by_row(make: Any) -> None:
    odd = "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else 'gone' }}{% endfor %}" + (
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    with pytest.raises(ConfigError, match=r"data\.template: expected a chat template .* for row 1; mark what"):
        pieces(make(odd), TURNS)


def test_conversations_need_a_chat_template(stories: Path, make: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"rows of messages need; got 'alpaca' \(the tokenizer has no chat template\)"
    ):
        encode(AutoTokenizer.from_pretrained(stories), TURNS)
    with pytest.raises(ConfigError, match=r"got 'plain'; set \"chat\""):
        encode(make(CHATML), TURNS, template="plain")


def test_tools_are_shown_to_the_template(make: Any) -> None:
    tokenizer = make("{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}" + CHATML)
    rows = {"messages": [write_turns(TURNS)] * 2, "tools": ['[{"name": "add"}]', ""]}
    first, second = encode_causal(rows, DataSettings("x", Split("files")), tokenizer).examples
    assert first is not None
    assert second is not None
    assert (first.prompt[:5], second.prompt[:5]) == ("[add]", "<syst")


def test_a_template_that_writes_the_date_writes_the_given_one(make: Any) -> None:
    dated = "\n{{ strftime_now('%d %b %Y, %H:%M 100%%') }}\n" + CHATML
    written = write_conversation(TURNS, make(dated), place="row 1", date="2026-11-29").text
    fixed = write_conversation(TURNS, make("\n29 Nov 2026, 00:00 100%\n" + CHATML), place="row 1", date=DAY).text
    assert written == fixed
    (first,), (again,), (other,) = (
        encode(make(dated), TURNS, **options).examples for options in ({}, {"date": DAY}, {"date": "2025-01-02"})
    )
    assert first is not None
    assert again is not None
    assert other is not None
    assert first.input_ids.tolist() == again.input_ids.tolist() != other.input_ids.tolist()


def test_the_clock_knows_the_formats_of_templates(make: Any) -> None:
    for form, text in (("%-d %B %y", "2 January 25"), ("%Y-%m-%d", "2025-01-02"), ("%A, %j", "Thursday, 002")):
        template = "{% if strftime_now is defined %}{{ strftime_now('" + form + "') }}{% endif %}|" + CHATML
        text_of = write_conversation(TURNS, make(template), place="row 1", date="2025-01-02").text
        assert text_of.startswith(f"{text}|")
    assert clock("2025-01-02") != clock("2025-01-03")
