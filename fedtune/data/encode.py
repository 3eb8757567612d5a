"""From rows to examples: a template makes the text, the tokenizer the ids, the boundary decides what is learned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedtune.data.chat import Answer, write_conversation
from fedtune.data.conversation import read_turns
from fedtune.data.settings import DataSettings, Form
from fedtune.data.templates import DAY, Message, assistant, join, prompt_of, render, template_of, user, writes_date
from fedtune.errors import ConfigError, Fault

Ids = NDArray[np.int64]

IGNORED = -100
"""Label of a token that is not in the loss."""

_BATCH = 256
"""Texts per call of the tokenizer: it keeps every token's text and place until the call's result is dropped."""


class Tokenizer(Protocol):
    """What is used of transformers' PreTrainedTokenizerBase."""

    @property
    def is_fast(self) -> bool: ...
    @property
    def eos_token_id(self) -> Any: ...
    @property
    def chat_template(self) -> Any: ...
    def __call__(self, *texts: Any, **options: Any) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def get_chat_template(self, chat_template: Any = None, tools: Any = None) -> Any: ...


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
    """Text before the last answer that is left; empty for rows of plain text and packed rows."""
    reference: str
    """That answer in full, however much of it was cut: output, turn, text or label; empty for packed rows."""
    prompt_tokens: int
    """Leading input_ids that encode the prompt: generation continues these, and never encodes the prompt anew."""
    token_types: Ids | None = None
    """(tokens,), what the tokenizer calls token_type_ids: the text of a pair that a token belongs to; None where it
    gives none, or all are 0."""
    rejected: Example | None = None
    """The same prompt with the answer that this one is preferred to; None for rows of one answer."""
    beta: float = 0.0
    """Of rows with a rejected answer: how far a client is to move from the reference (`Preference`), once it knows."""
    margin: float = 0.0
    """Of the same: log p(this answer) - log p(the rejected one) by the reference, once the client has measured it."""


@dataclass(frozen=True)
class Encoded:
    examples: Sequence[Example | None]
    """One per row; None where no token of the answer is left."""
    prompt_tokens: Ids
    """(rows,), those before the first answer, uncut."""
    tokens: Ids
    """(rows,), uncut."""
    unanswered: int = 0
    """Conversations without a turn of the assistant that answers anything; their example is None."""
    equal: Sequence[str] = ()
    """Places of the rows whose preferred and rejected answer are equal; their example is None."""


@dataclass(frozen=True)
class _Text:
    whole: str
    answers: Sequence[Answer]
    """What is learned, in order: of a chat each turn of the assistant with the template's marks around it."""
    ends: bool
    """Whether the end-of-sequence token is to follow."""
    special: bool
    """Whether the tokenizer adds its own special tokens; a chat template has written them already."""


def _row(number: int) -> str:
    return f"row {number + 1}"


def encode_causal(
    rows: Mapping[str, Sequence[str]],
    settings: DataSettings,
    tokenizer: Tokenizer,
    *,
    place: Callable[[int], str] = _row,
) -> Encoded:
    """Return one example per row for next-token training.

    Prompt and answer are encoded as one text, as the model met text in pretraining, and split by the character
    offsets: encoded apart, a SentencePiece tokenizer would put a space before the answer. A token across the boundary
    belongs to the answer. An end-of-sequence token follows answers, and plain text when packing, because the next text
    begins there.

    Args:
        rows: by part, the rows' texts.
        settings: the recipe's table `data`.
        tokenizer: the base's.
        place: from a row's number to where it was read, for messages.

    Raises: ConfigError if columns are missing, the template is impossible, or the tokenizer gives no offsets.
    """
    if not tokenizer.is_fast:
        expected = "a fast tokenizer (tokenizer.json), which tells the characters of each token"
        raise ConfigError(Fault("model.base", expected, type(tokenizer).__name__))
    texts = list(_texts(rows, settings, tokenizer, place))
    coded: list[tuple[Example | None, int, int]] = []
    for start in range(0, len(texts), _BATCH):
        coded += _encode_texts(texts[start : start + _BATCH], settings, tokenizer)
    return Encoded(
        examples=[example for example, _, _ in coded],
        prompt_tokens=np.array([prompt_tokens for _, prompt_tokens, _ in coded], dtype=np.int64),
        tokens=np.array([tokens for _, _, tokens in coded], dtype=np.int64),
        unanswered=sum(not text.answers for text in texts),
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
    turns = [user(question)] if isinstance(question, str) else question
    return render(turns, tokenizer, place="the question", date=settings.date or DAY, open_answer=True), False


def depends_on_date(settings: DataSettings, tokenizer: Tokenizer, *, form: Form) -> bool:
    """Return whether the texts of rows of a form change with `data.date`."""
    return form != "text" and template_of(settings, tokenizer) == "chat" and writes_date(tokenizer)


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
    """Yield each text's example, the tokens before its first answer and all its tokens, the latter two uncut."""
    encoded = tokenizer(
        [text.whole for text in texts],
        add_special_tokens=texts[0].special,
        return_attention_mask=False,
        verbose=False,  # longer than the model allows: cut below
    )
    end = tokenizer.eos_token_id
    for row, (text, ids) in enumerate(zip(texts, encoded["input_ids"], strict=True)):
        if not text.answers:
            yield None, 0, 0
            continue
        spans = [_span(encoded, row, answer, text, len(ids)) for answer in text.answers]
        boundary = spans[0][0]
        if text.ends and end is not None and ids[-1:] != [end]:
            ids = [*ids, end]
            spans[-1] = (spans[-1][0], len(ids))
        length = min(len(ids), settings.max_tokens)
        if max(1, boundary) >= length:
            yield None, boundary, len(ids)
            continue
        if settings.loss_on == "all":
            spans = [(0, len(ids))]
        # Nothing predicts the first token, not even one that spans the boundary.
        learned = [(max(1, begin), min(stop, length)) for begin, stop in spans if max(1, begin) < min(stop, length)]
        labels = np.full(length, IGNORED, dtype=np.int64)
        for begin, stop in learned:
            labels[begin:stop] = ids[begin:stop]
        shown, answer = _last_shown(encoded, row, text, length, len(encoded["input_ids"][row]))
        example = Example(
            input_ids=np.array(ids[:length], dtype=np.int64),
            labels=labels,
            characters=sum(
                (len(text.whole) if stop == len(ids) else _reach(encoded, row, stop - 1))
                - _reach(encoded, row, begin - 1)
                for begin, stop in learned
            ),
            prompt=text.whole[: answer.begin],
            reference=answer.reference,
            prompt_tokens=shown,
        )
        yield example, boundary, len(ids)


def _span(encoded: Any, row: int, answer: Answer, text: _Text, count: int) -> tuple[int, int]:
    """Return the first token of an answer and the one after its last; (count, count) if no token holds any of it."""
    places = range(answer.begin, answer.end)
    # White space may belong to no token.
    begin = next((token for place in places if (token := encoded.char_to_token(row, place)) is not None), count)
    if answer.end == len(text.whole):  # with whatever the tokenizer itself puts at the end
        return begin, count
    last = next((token for place in reversed(places) if (token := encoded.char_to_token(row, place)) is not None), None)
    return begin, count if last is None else last + 1


def _last_shown(encoded: Any, row: int, text: _Text, length: int, count: int) -> tuple[int, Answer]:
    """Return the last answer of which a token is left at a length, and the tokens before it."""
    starts = [(_span(encoded, row, answer, text, count)[0], answer) for answer in text.answers]
    return next(((start, answer) for start, answer in reversed(starts) if start < length), starts[0])


def _reach(encoded: Any, row: int, token: int) -> int:
    """Return the characters up to the end of a token; 0 for one that the tokenizer put before the text."""
    span = encoded.token_to_chars(row, token)
    return 0 if span is None else int(span.end)


def _texts(
    rows: Mapping[str, Sequence[str]], settings: DataSettings, tokenizer: Tokenizer, place: Callable[[int], str]
) -> Iterator[_Text]:
    if "messages" in rows:
        return _chats(rows, settings, tokenizer, place)
    if "output" not in rows:
        if "text" not in rows:
            raise ConfigError(_missing("output", "causal training", rows, "or map text, for plain text"))
        return (_text(text, "", text, ends=settings.packing) for text in rows["text"])
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
        exchanges = ([user(join(*row[:2], "\n\n")), assistant(row[2])] for row in columns)
        return (_chat(turns, settings, tokenizer, place(number)) for number, turns in enumerate(exchanges))
    return (
        _text(prompt_of(template, *row[:2]) + row[2], prompt_of(template, *row[:2]), row[2], ends=True)
        for row in columns
    )


def _text(whole: str, prompt: str, reference: str, *, ends: bool) -> _Text:
    return _Text(whole, [Answer(len(prompt), len(whole), reference)], ends=ends, special=True)


def _chats(
    rows: Mapping[str, Sequence[str]], settings: DataSettings, tokenizer: Tokenizer, place: Callable[[int], str]
) -> Iterator[_Text]:
    if (template := template_of(settings, tokenizer)) != "chat":
        expected = "the chat template of the base's tokenizer, which rows of messages need"
        lacks = " (the tokenizer has no chat template)" if tokenizer.chat_template is None else ""
        hint = "use a base that has one, put chat_template.jinja into its folder, or give instruction and output"
        raise ConfigError(Fault("data.template", expected, f"{template!r}{lacks}", hint if lacks else 'set "chat"'))
    tools = rows.get("tools", [""] * len(rows["messages"]))
    for number, (turns, schemas) in enumerate(zip(rows["messages"], tools, strict=True)):
        yield _chat(read_turns(turns), settings, tokenizer, place(number), json.loads(schemas) if schemas else None)


def _chat(
    turns: Sequence[Message], settings: DataSettings, tokenizer: Tokenizer, place: str, tools: Any = None
) -> _Text:
    date = settings.date or DAY
    conversation = write_conversation(turns, tokenizer, place=place, date=date, tools=tools)
    return _Text(conversation.text, conversation.answers, ends=False, special=False)


def _missing(part: str, purpose: str, rows: Mapping[str, Sequence[str]], otherwise: str = "") -> Fault:
    hint = f"map it with fields = {{ {part} = ... }}" + (f", {otherwise}" if otherwise else "")
    return Fault(f"data.fields.{part}", f"a column for {part}, which {purpose} needs", ", ".join(rows) or "none", hint)
