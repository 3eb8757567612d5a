from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fedtune.data.chat import write_conversation
from fedtune.data.encode import encode_causal, encode_classes
from fedtune.data.federation import digest, federate
from fedtune.data.settings import DataSettings, Split
from fedtune.data.templates import DAY
from fedtune.edge.bundle import CHAT_TEMPLATE, TOKENIZER, TOKENIZER_CONFIG, read_bundle
from fedtune.edge.tokenizer import READ, EdgeTokenizer, read_tokenizer, tokenizer_of
from fedtune.errors import StoreError
from fedtune.model.edge_tokenizer import tokenizer_files
from fedtune.runs.tokenizer_check import check_tokenizer
from tests.edge.bundles import write_bundle

CORPUS = [
    "Once upon a time, there was a little girl.",
    "Größe und naïve 漢字 don't 12 345",
    "a b  c\n\td <x> user assistant",
] * 3
MARKED = (
    "{{ bos_token or '' }}{% for m in messages %}\n<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|end|>{% endgeneration %}{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TURNS = [
    {"role": "user", "content": "Once <|end|> upon"},
    {"role": "assistant", "content": " a time"},
    {"role": "user", "content": "was"},
    {"role": "assistant", "content": "Größe"},
]


def byte_level() -> Any:
    """Return a tokenizer as GPT-2's: bytes, nothing put around a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=end, eos_token=end, unk_token=end)


def with_marks() -> Any:
    """Return a tokenizer as Qwen's: normalised, split by a pattern, with marks for the turns of a chat."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    pattern = Regex(r"(?i:'s|'t)|\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+")
    split = pre_tokenizers.Split(pattern, behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|pad|>", "<|im_start|>", "<|end|>"])
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        extra_special_tokens=["<|im_start|>"],
        padding_side="left",
    )
    wrapped.chat_template = MARKED
    return wrapped


def like_sentencepiece() -> Any:
    """Return a tokenizer as Llama 2's: a space before the text, bytes for the unknown, a token around it."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for text in ("▁", *"Onceupatimrhwslgdo.,", "▁a", "on", "▁t", "he"):
        vocabulary.setdefault(text, len(vocabulary))
    merges = [("▁", "a"), ("o", "n"), ("▁", "t"), ("h", "e")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token=AddedToken("</s>", rstrip=True),
        unk_token="<unk>",
        add_bos_token=True,
        add_eos_token=True,
    )
    wrapped.chat_template = {"default": MARKED, "tool_use": "{{ tools | tojson }}" + MARKED}
    return wrapped


def word_pieces() -> Any:
    """Return a tokenizer as BERT's: pairs have types, spaces are cleaned up."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=True,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    )


KINDS = {
    "byte level": byte_level,
    "marks": with_marks,
    "sentence pieces": like_sentencepiece,
    "word pieces": word_pieces,
}


@cache
def both(kind: str) -> tuple[Any, EdgeTokenizer]:
    """Return a tokenizer of transformers and the device's of the same base."""
    theirs = KINDS[kind]()
    return theirs, tokenizer_of(tokenizer_files(theirs))


def check_same(theirs: Any, ours: EdgeTokenizer, text: str, *, special: bool) -> None:
    wanted = theirs(text, add_special_tokens=special, verbose=False)
    got = ours(text, add_special_tokens=special)
    assert got["input_ids"] == wanted["input_ids"]
    assert got.encodings[0].offsets == wanted.encodings[0].offsets
    for name in wanted:
        assert got[name] == wanted[name], name
    assert all(got.char_to_token(place) == wanted.char_to_token(place) for place in range(len(text)))
    for token in range(len(wanted["input_ids"])):
        span = wanted.token_to_chars(token)
        assert got.token_to_chars(0, token) == (None if span is None else tuple(span))
    for skip in (False, True):
        ids = wanted["input_ids"]
        assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)


TEXT = st.lists(
    st.sampled_from(
        ["<s>", "</s>", "<unk>", "<|end|>", "<|endoftext|>", "<think>", "[SEP]", "[CLS]", " ", "  ", "a", "Once"]
    )
    | st.text(max_size=12),
    max_size=6,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT, special=st.booleans())
def test_any_text_gives_the_tokens_of_transformers(kind: str, text: str, special: bool) -> None:
    text = text.encode("utf-8", "ignore").decode()
    check_same(*both(kind), text, special=special)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_and_pairs_are_cut_as_by_transformers(kind: str) -> None:
    theirs, ours = both(kind)
    for seconds in (None, ["", "two of them", "x " * 9]):
        wanted = theirs(CORPUS[:3], seconds, verbose=False)
        got = ours(CORPUS[:3], seconds)
        assert all(got[name] == wanted[name] for name in wanted)
    for second in (None, "", "another " * 4):
        wanted = theirs(CORPUS[1], second, truncation=True, max_length=9)
        assert ours(CORPUS[1], second, truncation=True, max_length=9)["input_ids"] == wanted["input_ids"]
    check_same(theirs, ours, CORPUS[0] * 3, special=True)  # whole again


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_limits_are_those_of_transformers(kind: str) -> None:
    theirs, ours = both(kind)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "padding_side", "model_max_length", "chat_template"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.specials == theirs.special_tokens_map
    assert ours.convert_ids_to_tokens(5) == theirs.convert_ids_to_tokens(5)


@pytest.mark.parametrize("kind", ["marks", "sentence pieces"])
@pytest.mark.parametrize("tools", [None, [{"name": "add", "description": "<é>"}]])
def test_conversations_become_the_same_text_and_the_same_tokens(kind: str, tools: Any) -> None:
    theirs, ours = both(kind)
    options: dict[str, Any] = {"return_assistant_tokens_mask": True, "tools": tools}
    wanted, got = theirs.apply_chat_template(TURNS, **options), ours.apply_chat_template(TURNS, **options)
    assert got["input_ids"] == wanted["input_ids"]
    assert got["assistant_masks"] == wanted["assistant_masks"]
    assert sum(got["assistant_masks"]) > 0
    for open_answer in (True, False):
        more: dict[str, Any] = {"tokenize": False, "add_generation_prompt": open_answer, "tools": tools}
        assert ours.apply_chat_template(TURNS, **more) == theirs.apply_chat_template(TURNS, **more)
    assert ours.apply_chat_template(TURNS, return_dict=False) == theirs.apply_chat_template(TURNS, return_dict=False)
    written = [write_conversation(TURNS, each, place="row 1", date=DAY, tools=tools) for each in (theirs, ours)]
    assert written[0] == written[1]


def equal(first: Any, second: Any) -> bool:
    return all(
        one == other if not hasattr(one, "tobytes") else one.tobytes() == other.tobytes()
        for one, other in zip(vars(first).values(), vars(second).values(), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_rows_become_the_same_examples(kind: str) -> None:
    theirs, ours = both(kind)
    rows = {
        "instruction": CORPUS[:3],
        "input": ["", "b", ""],
        "output": ["yes", "漢字 " * 9, "</s> no"],
        "label": list("aba"),
    }
    for template in ("alpaca", "auto"):
        settings = DataSettings("x", Split("files"), template=template, max_tokens=60)
        pairs = [encode_causal(rows, settings, each).examples for each in (theirs, ours)]
        assert [one is None for one in pairs[0]] == [one is None for one in pairs[1]]
        assert all(equal(one, other) for one, other in zip(*pairs, strict=True) if one is not None)
    texts = {"text": rows["output"], "input": rows["input"], "label": list("aba")}
    classes = [encode_classes(texts, settings, each, labels=["a", "b"]).examples for each in (theirs, ours)]
    assert all(equal(one, other) for one, other in zip(*classes, strict=True))


def test_the_small_base_reads_alike(stories: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(stories)
    ours = tokenizer_of(tokenizer_files(theirs))
    for text in ("", " ", "Once upon a time</s> <s>", *CORPUS):
        for special in (True, False):
            check_same(theirs, ours, text, special=special)
    # The base's own files say the same here: what transformers adds at load is written into them already.
    files = {name: (stories / name).read_bytes() for name in (TOKENIZER, TOKENIZER_CONFIG)}
    check_same(theirs, tokenizer_of(files), CORPUS[0], special=True)


def test_what_transformers_changes_at_load_is_written_into_the_files() -> None:
    theirs, ours = both("sentence pieces")
    text = "a"
    assert ours(text)["input_ids"][0] == ours.bos_token_id
    files = tokenizer_files(theirs)
    bare = json.loads(files[TOKENIZER]) | {"post_processor": None}
    other = tokenizer_of({**files, TOKENIZER: json.dumps(bare).encode()})
    assert other(text)["input_ids"] != theirs(text)["input_ids"]


def test_special_tokens_may_be_objects_and_templates_may_have_names() -> None:
    files = dict(tokenizer_files(both("marks")[0]))
    config = {
        "eos_token": {"content": "<|end|>", "lstrip": False, "__type": "AddedToken"},
        "pad_token": None,
        "chat_template": [{"name": "default", "template": "x"}, {"name": "tool_use", "template": "y"}],
    }
    del files[CHAT_TEMPLATE]
    tokenizer = tokenizer_of({**files, TOKENIZER_CONFIG: json.dumps(config).encode()})
    assert tokenizer.specials == {"eos_token": "<|end|>"}
    assert tokenizer.convert_ids_to_tokens(tokenizer.eos_token_id or 0) == "<|end|>"
    assert (tokenizer.get_chat_template(), tokenizer.get_chat_template(tools=[{}])) == ("x", "y")
    assert (tokenizer.bos_token_id, tokenizer.pad_token_id) == (None, None)


def test_a_bundle_gives_its_tokenizer_and_damaged_files_are_refused(tmp_path: Path) -> None:
    files = tokenizer_files(both("marks")[0])
    bundle = read_bundle(write_bundle(tmp_path / "whole", files=files))
    check_same(both("marks")[0], read_tokenizer(bundle), CORPUS[1], special=True)
    for wrong, words in (
        ({}, "expected tokenizer.json in the bundle"),
        ({TOKENIZER: b"{}"}, "tokenizer.json: expected a tokenizer; got"),
        ({**files, TOKENIZER_CONFIG: b"[]"}, "tokenizer_config.json: expected an object"),
        ({**files, TOKENIZER_CONFIG: b"{"}, "tokenizer_config.json: expected JSON"),
        ({**files, CHAT_TEMPLATE: b"\xff"}, "expected a text in UTF-8"),
    ):
        with pytest.raises(StoreError, match=words):
            tokenizer_of(wrong)


@pytest.mark.guarantee("G1")
@pytest.mark.parametrize("key", [*READ, "bos_token"])
def test_any_value_of_another_type_is_one_error(key: str) -> None:
    files = tokenizer_files(both("marks")[0])
    refused = list[str]()
    for value in (0, -1, "x", [], [1], [{"name": 1}], {}, {"a": 1}, True, 1e999, float("nan"), 10**400, None):
        config = {**json.loads(files[TOKENIZER_CONFIG]), key: value}
        try:
            tokenizer = tokenizer_of({**files, TOKENIZER_CONFIG: json.dumps(config).encode()})
        except StoreError as error:
            refused.append(str(error))
        else:
            assert tokenizer("a b")["input_ids"]
    assert all(f"under {key!r}" in text for text in refused)
    assert refused or key == "bos_token"


def test_a_panic_of_the_package_is_an_error_like_any_other() -> None:
    files = tokenizer_files(both("sentence pieces")[0])
    broken = json.loads(files[TOKENIZER])
    broken["post_processor"]["single"][0]["SpecialToken"]["id"] = "nowhere"
    with pytest.raises(StoreError, match=r"tokenizer\.json: expected a tokenizer"):
        tokenizer_of({**files, TOKENIZER: json.dumps(broken).encode()})


def test_no_chat_template_is_none() -> None:
    tokenizer = both("byte level")[1]
    assert tokenizer.chat_template is None
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.get_chat_template()
    files: Mapping[str, bytes] = tokenizer_files(both("byte level")[0])
    assert CHAT_TEMPLATE not in files


def digests(tokenizers: tuple[Any, Any], source: Path, **options: Any) -> list[str]:
    settings = DataSettings(str(source), Split("iid", clients=2), **options)
    federations = [federate(settings, tokenizer=each, task="causal", seed=3, root=Path()) for each in tokenizers]
    assert federations[0].notes == federations[1].notes
    return [digest(federation) for federation in federations]


def test_real_rows_become_the_same_examples(stories: Path, shared: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(stories)
    pair = (theirs, tokenizer_of(tokenizer_files(theirs)))
    first, second = digests(pair, shared / "data" / "dolly" / "test.jsonl", limit=150, max_tokens=256)
    assert first == second


@pytest.mark.slow
def test_a_chat_model_reads_real_rows_alike(smollm2: Path, shared: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(smollm2)
    files = tokenizer_files(theirs)
    check_tokenizer(theirs, files)
    pair = (theirs, tokenizer_of(files))
    assert pair[1].chat_template
    for options in ({}, {"loss_on": "all", "template": "alpaca"}, {"date": "2026-11-29", "packing": True}):
        first, second = digests(pair, shared / "data" / "dolly" / "test.jsonl", **options)
        assert first == second
