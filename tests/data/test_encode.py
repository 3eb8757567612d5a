from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedtune.data.encode import IGNORED, Encoded, Example, encode_causal, encode_classes, pack, prompt_text
from fedtune.data.settings import DataSettings, Split
from fedtune.errors import ConfigError

BOS, EOS = 1, 2
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ROW = {"instruction": ["Say hi."], "input": [""], "output": ["Hello there"]}


@pytest.fixture(scope="module")
def tokenizer(stories: Path) -> Any:
    return AutoTokenizer.from_pretrained(stories)


def encode(tokenizer: Any, rows: dict[str, list[str]], **options: Any) -> Encoded:
    return encode_causal(rows, DataSettings("x", Split("files"), **options), tokenizer)


def only(tokenizer: Any, rows: dict[str, list[str]], **options: Any) -> Example:
    (example,) = encode(tokenizer, rows, **options).examples
    assert example is not None
    return example


def learned(tokenizer: Any, example: Example) -> str:
    """Decode the tokens in the loss, without the space that decoding strips from a first word."""
    assert isinstance(example.labels, np.ndarray)
    ids = example.labels[example.labels != IGNORED]
    return "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ").replace("<0x0A>", "\n")


def test_alpaca_prompts_are_stanfords(tokenizer: Any) -> None:
    bare = only(tokenizer, ROW)
    assert bare.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nSay hi.\n\n### Response:"
    )
    given_input = only(tokenizer, ROW | {"input": ["to Bob"]})
    assert given_input.prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n### Instruction:\nSay hi.\n\n### Input:\nto Bob"
        "\n\n### Response:"
    )
    assert given_input.reference == "Hello there"


def test_only_the_completion_and_its_end_are_learned(tokenizer: Any) -> None:
    example = only(tokenizer, ROW)
    assert isinstance(example.labels, np.ndarray)
    assert example.input_ids[0] == BOS
    assert example.input_ids[-1] == example.labels[-1] == EOS
    assert learned(tokenizer, example) == "Hello there</s>"
    assert example.characters == len("Hello there")
    assert (example.labels[: example.prompt_tokens] == IGNORED).all()
    assert (example.labels[example.prompt_tokens :] == example.input_ids[example.prompt_tokens :]).all()
    assert example.input_ids[: example.prompt_tokens].tolist() == tokenizer(example.prompt)["input_ids"]


def test_loss_on_all_learns_everything_but_the_first_token(tokenizer: Any) -> None:
    example = only(tokenizer, ROW, loss_on="all")
    assert isinstance(example.labels, np.ndarray)
    assert example.labels[0] == IGNORED
    assert example.labels[1:].tolist() == example.input_ids[1:].tolist()
    assert example.characters == len(example.prompt) + len("Hello there")


def test_plain_text_is_taken_as_it_is(tokenizer: Any) -> None:
    example = only(tokenizer, {"text": ["Once upon a time"]})
    assert example.input_ids.tolist() == tokenizer("Once upon a time")["input_ids"]
    assert (example.prompt, example.reference, example.prompt_tokens) == ("", "Once upon a time", 1)
    assert example.characters == len("Once upon a time")
    assert only(tokenizer, {"text": ["Once"]}, packing=True).input_ids[-1] == EOS


def test_without_a_first_special_token_the_first_word_is_not_counted(stories: Path) -> None:
    bare = AutoTokenizer.from_pretrained(stories, add_bos_token=False)
    bare.backend_tokenizer.post_processor = None
    example = only(bare, {"text": ["Hello"]})
    assert isinstance(example.labels, np.ndarray)
    assert bare.convert_ids_to_tokens(example.input_ids) == ["▁He", "ll", "o"]
    assert example.labels.tolist()[0] == IGNORED
    assert example.characters == len("llo")


def test_own_templates_fill_in_once(tokenizer: Any) -> None:
    rows = {"instruction": ["{input}?"], "input": ["{output}"], "output": ["yes"]}
    example = only(tokenizer, rows, template="Q: {instruction} ({input})\nA: {output}")
    assert example.prompt == "Q: {input}? ({output})\nA: "
    assert learned(tokenizer, example).strip() == "yes</s>"
    assert only(tokenizer, {"input": ["a"], "output": ["b"]}, template="plain").prompt == "a\n"


def test_chat_uses_the_tokenizers_template_and_adds_nothing(stories: Path) -> None:
    chatty = AutoTokenizer.from_pretrained(stories)
    chatty.chat_template = CHAT
    example = only(chatty, ROW | {"input": ["Now."]}, template="chat")
    assert example.prompt == "<user>Say hi.\n\nNow.<assistant>"
    assert learned(chatty, example) == "Hello there</s>"
    assert BOS not in example.input_ids
    assert example.input_ids.tolist().count(EOS) == 1


def test_the_reference_of_a_chat_is_the_answer_without_the_templates_marks(stories: Path) -> None:
    chatty = AutoTokenizer.from_pretrained(stories)
    chatty.chat_template = CHAT
    assert only(chatty, ROW, template="chat").reference == "Hello there"


def test_a_first_token_across_the_boundary_is_predicted_by_nothing() -> None:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "until": 1, "</s>": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bare = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    example = only(bare, {"instruction": ["un"], "output": ["til until"]}, template="{instruction}{output}")
    assert isinstance(example.labels, np.ndarray)
    assert example.labels.tolist() == [IGNORED, 1, 2]
    assert example.characters == len(" until")


def test_an_impossible_template_is_refused_by_name(tokenizer: Any, stories: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.template: .* no chat template; got 'chat'"):
        encode(tokenizer, ROW, template="chat")
    odd = AutoTokenizer.from_pretrained(stories)
    odd.chat_template = "{{ messages | length }}{% if add_generation_prompt %}go{% endif %}"
    with pytest.raises(ConfigError, match="whose answer follows its generation prompt"):
        encode(odd, ROW, template="chat")
    with pytest.raises(ConfigError, match=r"data\.fields\.output: expected a column for output"):
        encode(tokenizer, {"instruction": ["a"]})
    with pytest.raises(ConfigError, match=r"data\.fields\.instruction: .* template 'alpaca' needs; got input, output"):
        encode(tokenizer, {"input": ["a"], "output": ["b"]})


def test_long_examples_are_cut_and_dropped_when_no_answer_is_left(tokenizer: Any) -> None:
    whole = only(tokenizer, ROW, template="plain")
    length, prompt = len(whole.input_ids), whole.prompt_tokens
    cut = only(tokenizer, ROW, template="plain", max_tokens=prompt + 1)
    assert cut.input_ids.tolist() == whole.input_ids[: prompt + 1].tolist()
    assert cut.characters == len(tokenizer.convert_ids_to_tokens([cut.input_ids[-1]])[0].lstrip("▁"))
    assert cut.reference == "Hello there"
    ending_cut = only(tokenizer, ROW, template="plain", max_tokens=length - 1)
    assert ending_cut.characters == len("Hello there")
    dropped = encode(tokenizer, ROW, template="plain", max_tokens=prompt)
    assert dropped.examples == [None]
    assert dropped.tokens.tolist() == [length]
    assert dropped.prompt_tokens.tolist() == [prompt]


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
)
def test_any_text_is_split_where_the_answer_begins(tokenizer: Any, question: str, answer: str) -> None:
    rows = {"instruction": [question], "output": [answer]}
    example = only(tokenizer, rows, template="plain", max_tokens=10_000)
    whole = tokenizer(question + "\n" + answer)["input_ids"]
    assert example.input_ids.tolist() in (whole, [*whole, EOS])
    # All but a token across the boundary: the prompt's tokens reach no further than the prompt.
    assert example.characters >= len(answer)
    assert example.characters - len(answer) < 16
    assert (np.asarray(example.labels) != IGNORED).sum() == len(example.input_ids) - example.prompt_tokens


def test_packed_rows_hold_whole_examples_in_order(tokenizer: Any) -> None:
    texts = ["Once upon a time", "there", "was a big dog", "who"]
    examples = [example for example in encode(tokenizer, {"text": texts}, packing=True).examples if example]
    longest = max(len(example.input_ids) for example in examples)
    rows = pack(examples, max_tokens=longest + 4)
    assert len(rows) < len(examples)
    assert max(len(row.input_ids) for row in rows) <= longest + 4
    joined = np.concatenate([row.input_ids for row in rows])
    assert joined.tolist() == np.concatenate([example.input_ids for example in examples]).tolist()
    labels = np.concatenate([np.asarray(row.labels) for row in rows])
    assert (labels[joined == BOS] == IGNORED).all()
    assert sum(row.characters for row in rows) == sum(map(len, texts))


def test_classes_are_numbered_and_pairs_are_encoded_as_pairs(tokenizer: Any) -> None:
    options = DataSettings("x", Split("files"), max_tokens=6)
    rows = {"instruction": ["big dog", "a"], "input": ["red cat", "b"], "label": ["no", "yes"]}
    encoded = encode_classes(rows, options, tokenizer, labels=["no", "yes"])
    first, second = encoded.examples
    assert first is not None
    assert second is not None
    expected = tokenizer("big dog", "red cat", truncation=True, max_length=6)["input_ids"]
    assert first.input_ids.tolist() == expected
    assert len(expected) == 6
    assert (first.labels, second.labels) == (0, 1)
    assert encoded.tokens.tolist() == [len(tokenizer("big dog", "red cat")["input_ids"]), len(second.input_ids)]
    assert (first.prompt, first.reference, first.characters) == ("big dog\nred cat", "no", 0)
    with pytest.raises(ConfigError, match=r"data\.fields\.label"):
        encode_classes({"text": ["a"]}, options, tokenizer, labels=["no"])
    with pytest.raises(ConfigError, match=r"data\.fields\.text"):
        encode_classes({"label": ["no"]}, options, tokenizer, labels=["no"])


def test_a_tokenizer_without_character_places_is_refused(tokenizer: Any) -> None:
    class Slow:
        is_fast = False

    with pytest.raises(ConfigError, match=r"model\.base: expected a fast tokenizer .*; got Slow"):
        encode(Slow(), ROW)


def test_auto_fills_the_chat_template_where_the_tokenizer_has_one(tokenizer: Any, stories: Path) -> None:
    assert only(tokenizer, ROW).prompt.startswith("Below is an instruction")
    chatty = AutoTokenizer.from_pretrained(stories)
    chatty.chat_template = CHAT
    assert only(chatty, ROW).prompt == "<user>Say hi.<assistant>"


def test_a_question_of_the_user_is_written_as_those_of_the_rows(tokenizer: Any, stories: Path) -> None:
    chatty = AutoTokenizer.from_pretrained(stories)
    chatty.chat_template = CHAT
    for name in (tokenizer, chatty):
        for template in ("auto", "plain", "alpaca", "Q: {instruction}\nA:{output}"):
            options = DataSettings("x", Split("files"), template=template)
            text, special = prompt_text("Say hi.", options, name)
            example = only(name, ROW, template=template)
            assert text == example.prompt
            ids = name(text, add_special_tokens=special)["input_ids"]
            assert example.input_ids[: len(ids)].tolist() == ids
    options = DataSettings("x", Split("files"))
    assert prompt_text("Once", options, chatty, form="text") == ("Once", True)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert prompt_text(turns, options, chatty) == ("<system>Be brief.<user>Hi<assistant>", False)
    assert prompt_text(turns, options, tokenizer)[0].endswith("### Instruction:\nHi\n\n### Response:")


def test_a_chat_template_that_refuses_a_row_is_one_error_with_its_words(stories: Path) -> None:
    strict = AutoTokenizer.from_pretrained(stories)
    strict.chat_template = "{{ raise_exception('a system message is required') }}"
    with pytest.raises(ConfigError, match=r"data\.template: .*'a system message is required' from it for row 1"):
        encode(strict, ROW)


def test_token_types_are_what_the_tokenizer_gives_cut_or_not() -> None:
    raw = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2, "|": 3}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="$A |", pair="$A | $B:1 |:1", special_tokens=[("|", 3)])
    names = ["input_ids", "token_type_ids"]
    pairs = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", model_input_names=names)
    rows = {"instruction": ["a", "a a a"], "input": ["b b", "b"], "label": ["n", "n"]}
    options = DataSettings("x", Split("files"), max_tokens=5)
    whole, cut = encode_classes(rows, options, pairs, labels=["n"]).examples
    assert whole is not None
    assert cut is not None
    assert (whole.input_ids.tolist(), np.asarray(whole.token_types).tolist()) == ([1, 3, 2, 2, 3], [0, 0, 1, 1, 1])
    assert (cut.input_ids.tolist(), np.asarray(cut.token_types).tolist()) == ([1, 1, 3, 2, 3], [0, 0, 0, 1, 1])
    (single,) = encode_classes({"text": ["a b"], "label": ["n"]}, options, pairs, labels=["n"]).examples
    assert single is not None
    assert single.token_types is None
