"""From rows to examples: a template makes the text, the tokenizer the ids, the boundary decides what is learned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.data.settings import DataSettings, Form
from fedtune.data.templates import OTHERS, Message, join, prompt_of, render, template_of
from fedtune.errors import ConfigError, Fault

Ids = NDArray[np.int64]

IGNORED = -100
"""Label of a token that is not in the loss."""

_BATCH = 256
"""Texts per call of the tokenizer: it keeps every token's text and place until the call's result is dropped."""


class Tokenizer(Protocol):
    """What is used of transformers' PreTrainedTokenizerBase."""

    is_fast: bool
    eos_token_id: Any
    chat_template: Any

    def __call__(self, text: Any, text_pair: Any = None, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


@dataclass(frozen=True, eq=False)
class Example:
    """One row as the model sees it."""

    input_ids: Ids
    """(tokens,), special tokens included, not padded."""
    labels: Ids | int
    """Causal: (tokens,), the id itself where a token counts in the loss and -100 where not; not shifted, and always
    -100 at position 0, which nothing predicts. Classification: the class."""
    characters: int
    """Characters of the text whose tokens count in the loss, for bits per character; 0 for classification."""
    prompt: str
    """Text before the answer; empty for rows of plain text and packed rows."""
    reference: str
    """The wanted answer in full, however much of it was cut: output, text or label; empty for packed rows."""
    prompt_tokens: int
    """Leading input_ids that encode the prompt: generation continues these, and never encodes the prompt anew."""
    token_types: Ids | None = None
    """(tokens,), what the tokenizer calls token_type_ids: the text of a pair that a token belongs to; None where it
    gives none, or all are 0."""


@dataclass(frozen=True)
class Encoded:
    examples: Sequence[Example | None]
    """One per row; None where no token of the answer is left."""
    prompt_tokens: Ids
    """(rows,), uncut."""
    tokens: Ids
    """(rows,), uncut."""


@dataclass(frozen=True)
class _Text:
    prompt: str
    completion: str
    """What is learned after the prompt: the answer, in a chat with the template's marks around it."""
    reference: str
    ends: bool
    """Whether the end-of-sequence token is to follow."""
    special: bool
    """Whether the tokenizer adds its own special tokens; a chat template has written them already."""


def encode_causal(rows: Mapping[str, Sequence[str]], settings: DataSettings, tokenizer: Tokenizer) -> Encoded:
    """Return one example per row for next-token training.

    Prompt and completion are encoded as one text, as the model met text in pretraining, and split by the character
    offsets: encoded apart, a SentencePiece tokenizer would put a space before the answer. A token across the boundary
    belongs to the completion. An end-of-sequence token follows completions, and plain text when packing, because
    the next text begins there.

    Raises: ConfigError if columns are missing, the template is impossible, or the tokenizer gives no offsets.
    """
    if not tokenizer.is_fast:
        expected = "a fast tokenizer (tokenizer.json), which tells the characters of each token"
        raise ConfigError(Fault("model.base", expected, type(tokenizer).__name__))
    texts = list(_texts(rows, settings, tokenizer))
    coded: list[tuple[Example | None, int, int]] = []
    for start in range(0, len(texts), _BATCH):
        coded += _encode_texts(texts[start : start + _BATCH], settings, tokenizer)
    return Encoded(
        examples=[example for example, _, _ in coded],
        prompt_tokens=np.array([prompt_tokens for _, prompt_tokens, _ in coded], dtype=np.int64),
        tokens=np.array([tokens for _, _, tokens in coded], dtype=np.int64),
    )


def encode_classes(
    rows: Mapping[str, Sequence[str]], settings: DataSettings, tokenizer: Tokenizer, *, labels: Sequence[str]
) -> Encoded:
    """Return one example per row: `text`, or `instruction` with `input` as the second of a pair, and the label's index.

    Raises: ConfigError if a column is missing.
    """
    first = "instruction" if "instruction" in rows and "text" not in rows else "text"
    for part in (first, "label"):
        if part not in rows:
            raise ConfigError(_missing(part, "classification", rows))
    pairs = rows.get("input")
    index = {label: number for number, label in enumerate(labels)}
    examples: list[Example | None] = []
    lengths: list[int] = []
    for start in range(0, len(rows[first]), _BATCH):
        batch = slice(start, start + _BATCH)
        texts = list(rows[first][batch])
        seconds = None if pairs is None else list(pairs[batch])
        for position, (ids, types, length) in enumerate(_encode_pairs(texts, seconds, settings, tokenizer)):
            label = rows["label"][start + position]
            prompt = texts[position] if seconds is None else f"{texts[position]}\n{seconds[position]}"
            examples.append(Example(ids, index[label], 0, prompt, label, len(ids), types))
            lengths.append(length)
    return Encoded(examples, np.array(lengths, dtype=np.int64), np.array(lengths, dtype=np.int64))


def prompt_text(
    question: str | Sequence[Message], settings: DataSettings, tokenizer: Tokenizer, *, form: Form = "instruction"
) -> tuple[str, bool]:
    """Return (the text that a user's question becomes, whether the tokenizer is to add its special tokens).

    The question stands where the questions of the training rows stood, so the model meets what it was trained on.

    Args:
        question: a text, or the turns of a conversation, of which other templates than `chat` take the last.
        settings: the recipe's table `data`.
        tokenizer: the base's.
        form: of the training rows; raw text has no template, and the question is continued as it is.

    Raises: ConfigError if the tokenizer's chat template refuses the question.
    """
    last = question if isinstance(question, str) else str(question[-1]["content"])
    if form == "text":
        return last, True
    template = template_of(settings, tokenizer)
    if template != "chat":
        return prompt_of(template, last, ""), True
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
    return render(turns, tokenizer, place="the question", open_answer=True), False


def pack(examples: Sequence[Example], *, max_tokens: int) -> list[Example]:
    """Join whole examples, in order, into rows of at most max_tokens; each row takes what still fits.

    The label at an example's first position is -100, so nothing is predicted across a join.
    """
    rows: list[list[Example]] = []
    length = max_tokens
    for example in examples:
        if length + len(example.input_ids) > max_tokens:
            rows.append([])
            length = 0
        rows[-1].append(example)
        length += len(example.input_ids)
    return [
        Example(
            input_ids=np.concatenate([example.input_ids for example in row]),
            labels=np.concatenate([np.asarray(example.labels) for example in row]),
            characters=sum(example.characters for example in row),
            prompt="",
            reference="",
            prompt_tokens=0,
        )
        for row in rows
    ]


def _encode_pairs(
    texts: Sequence[str], seconds: Sequence[str] | None, settings: DataSettings, tokenizer: Tokenizer
) -> Iterator[tuple[Ids, Ids | None, int]]:
    """Yield each text's ids, its token types and the number of its tokens before it was cut."""
    encoded = tokenizer(texts, seconds, verbose=False)
    for row, whole in enumerate(encoded["input_ids"]):
        own = {name: encoded[name][row] for name in ("input_ids", "token_type_ids") if name in encoded}
        if len(whole) > settings.max_tokens:
            # Anew, by the tokenizer: of a pair it cuts the longer text first, and closes both as it closes whole ones.
            second = None if seconds is None else seconds[row]
            own = tokenizer(texts[row], second, truncation=True, max_length=settings.max_tokens)
        types = np.array(own.get("token_type_ids", [0]), dtype=np.int64)
        yield np.array(own["input_ids"], dtype=np.int64), types if types.any() else None, len(whole)


def _encode_texts(
    texts: Sequence[_Text], settings: DataSettings, tokenizer: Tokenizer
) -> Iterator[tuple[Example | None, int, int]]:
    """Yield each text's example, its prompt's tokens and all its tokens, the latter two uncut."""
    whole = [text.prompt + text.completion for text in texts]
    encoded = tokenizer(
        whole,
        add_special_tokens=texts[0].special,
        return_attention_mask=False,
        verbose=False,  # longer than the model allows: cut below
    )
    end = tokenizer.eos_token_id
    for row, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True)):
        places = range(len(text.prompt), len(whole[row]))
        tokens = (encoded.char_to_token(row, place) for place in places)  # none for white space that no token holds
        boundary = next((token for token in tokens if token is not None), len(ids))
        if text.ends and end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
        length = min(len(ids), settings.max_tokens)
        if max(1, boundary) >= length:
            yield None, boundary, len(ids)
            continue
        # Nothing predicts the first token, not even one that spans the boundary.
        lead = max(1, boundary) if settings.loss_on == "completion" and text.prompt else 1
        reach = len(whole[row]) if length == len(ids) else _reach(encoded, row, length - 1)
        example = Example(
            input_ids=np.array(ids[:length], dtype=np.int64),
            labels=np.array([IGNORED] * lead + ids[lead:length], dtype=np.int64),
            characters=reach - _reach(encoded, row, lead - 1),
            prompt=text.prompt,
            reference=text.reference,
            prompt_tokens=boundary,
        )
        yield example, boundary, len(ids)


def _reach(encoded: Any, row: int, token: int) -> int:
    """Return the characters up to the end of a token; 0 for one that the tokenizer put before the text."""
    span = encoded.token_to_chars(row, token)
    return 0 if span is None else int(span.end)


def _texts(rows: Mapping[str, Sequence[str]], settings: DataSettings, tokenizer: Tokenizer) -> Iterator[_Text]:
    if "output" not in rows:
        if "text" not in rows:
            raise ConfigError(_missing("output", "causal training", rows, "or map text, for plain text"))
        return (_Text("", text, text, ends=settings.packing, special=True) for text in rows["text"])
    count = len(rows["output"])
    empty = [""] * count
    columns = zip(rows.get("instruction", empty), rows.get("input", empty), rows["output"], strict=True)
    template = template_of(settings, tokenizer)
    needed = {"alpaca": ["instruction"], "chat": [], "plain": []}.get(
        template, re.findall(r"\{(instruction|input)\}", template)
    )
    for part in needed:
        if part not in rows:
            raise ConfigError(_missing(part, f"template {template!r:.40}", rows, "or choose another template"))
    if "instruction" not in rows and "input" not in rows:
        raise ConfigError(_missing("instruction", "a prompt", rows))
    if template == "chat":
        return (
            _chat(join(*row[:2], "\n\n"), row[2], tokenizer, f"row {number}")
            for number, row in enumerate(columns, start=1)
        )
    return (_fill(template, *row) for row in columns)


def _fill(template: str, instruction: str, context: str, output: str) -> _Text:
    return _Text(prompt_of(template, instruction, context), output, output, ends=True, special=True)


def _chat(question: str, output: str, tokenizer: Tokenizer, place: str) -> _Text:
    turns = [{"role": "user", "content": question}]
    prompt = render(turns, tokenizer, place=place, open_answer=True)
    answered = render([*turns, {"role": "assistant", "content": output}], tokenizer, place=place)
    if not answered.startswith(prompt):
        expected = "a chat template whose answer follows its generation prompt"
        got = f"{answered[:80]!r}, which does not begin with {prompt[-40:]!r}"
        raise ConfigError(Fault("data.template", expected, got, OTHERS))
    return _Text(prompt, answered[len(prompt) :], output, ends=False, special=False)


def _missing(part: str, purpose: str, rows: Mapping[str, Sequence[str]], otherwise: str = "") -> Fault:
    hint = f"map it with fields = {{ {part} = ... }}" + (f", {otherwise}" if otherwise else "")
    return Fault(f"data.fields.{part}", f"a column for {part}, which {purpose} needs", ", ".join(rows) or "none", hint)
