"""From a conversation to the text that the tokenizer's chat template writes, and the answers in it that are learned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.data.templates import OTHERS, Chatty, Message, chat_template_of, render, render_options
from fedtune.errors import ConfigError, Fault

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The mark by which a chat template says what the model writes."""


@dataclass(frozen=True)
class Answer:
    """What a model learns to write within a text."""

    begin: int
    """Character of the text at which it begins."""
    end: int
    """Character after it, the template's marks that close it included."""
    reference: str
    """The wanted answer without marks."""


@dataclass(frozen=True)
class Conversation:
    """A conversation as a text."""

    text: str
    answers: Sequence[Answer]
    """In order; empty if no turn of the assistant answers anything."""


def write_conversation(
    turns: Sequence[Message], tokenizer: Chatty, *, place: str, date: str, tools: Any = None
) -> Conversation:
    """Return a conversation as the chat template writes it, up to its last answer.

    The answers are what the template marks with `{% generation %}`. One without such marks is asked for the text up to
    each answer and for that with it: what the latter has more is the answer. A turn of the assistant that comes first,
    or whose `weight` is 0, is read and not learned.

    Args:
        turns: as `fedtune.data.conversation` writes them.
        tokenizer: the base's, with a chat template.
        place: of the row, for messages.
        date: the run's, for templates that write the day.
        tools: schemas of the tools that the assistant may call.

    Raises: ConfigError if the template refuses the conversation, or its answers have no place in the text.
    """
    last = max((i for i, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
    turns = turns[: last + 1]
    learned = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i > 0 and turn.get("weight") != 0]
    if not learned:
        return Conversation("", ())
    plain = [{key: value for key, value in turn.items() if key != "weight"} for turn in turns]
    text = render(plain, tokenizer, place=place, date=date, tools=tools)
    if GENERATION.search(chat_template_of(tokenizer, tools)) and not any(turn.get("weight") == 0 for turn in turns):
        return Conversation(text, list(_mark_answers(text, plain, tokenizer, date, tools)))
    answers = [
        _between(text, plain[:i], plain[i], tokenizer, last=i == last, place=place, date=date, tools=tools)
        for i in learned
    ]
    return Conversation(text, answers)


def _mark_answers(text: str, turns: Sequence[Message], tokenizer: Chatty, date: str, tools: Any) -> Iterator[Answer]:
    """Yield what the template itself marks as written by the model, in runs of whole tokens."""
    encoded = tokenizer.apply_chat_template(
        list(turns),
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        **render_options(tokenizer, date, tools),
    )
    places, runs = encoded.encodings[0].offsets, list[tuple[int, int]]()
    for (begin, end), counts in zip(places, encoded["assistant_masks"], strict=True):
        if counts and runs and runs[-1][1] >= begin:
            runs[-1] = (runs[-1][0], max(end, runs[-1][1]))
        elif counts:
            runs.append((begin, end))
    written = [str(turn["content"]) for turn in turns if turn["role"] == "assistant"]
    for number, (begin, end) in enumerate(runs):
        yield Answer(begin, end, written[number] if len(runs) == len(written) else text[begin:end])


def _between(
    text: str,
    before: Sequence[Message],
    answer: Message,
    tokenizer: Chatty,
    *,
    last: bool,
    place: str,
    date: str,
    tools: Any,
) -> Answer:
    """Return where a turn of the assistant stands in the text of its conversation."""
    prompt = render(before, tokenizer, place=place, date=date, tools=tools, open_answer=True)
    content = str(answer["content"])
    answered = text if last else render([*before, answer], tokenizer, place=place, date=date, tools=tools)
    if text.startswith(prompt) and answered.startswith(prompt):
        own = answered[len(prompt) :]
        if text.startswith(own, len(prompt)):
            return Answer(len(prompt), len(prompt) + len(own), content)
        if (shortened := _without_reasoning(text, len(prompt), own, content)) is not None:
            return shortened
    expected = "a chat template whose answer follows its generation prompt"
    got = f"{answered[:80]!r}, which does not begin with {prompt[-40:]!r}, for {place}"
    if text.startswith(prompt):
        expected = "a chat template that writes a turn alike whether others follow it or not"
        got = f"{text[len(prompt) :][:80]!r} in place of {answered[len(prompt) :][:80]!r} for {place}"
    hint = f"mark what it lets the model write by {{% generation %}}, or {OTHERS}"
    raise ConfigError(Fault("data.template", expected, got, hint))


def _without_reasoning(text: str, begin: int, own: str, content: str) -> Answer | None:
    """Return a turn of which a template leaves out the start once others follow it, as Qwen3's does with reasoning.

    Args:
        text: the whole conversation.
        begin: where the turn begins in it.
        own: the turn as the template writes it where it is the last one.
        content: the turn's text.
    """
    tail = content.strip().rpartition("\n")[2]
    closing = own.rpartition(tail)[2] if tail else ""
    end = text.find(tail + closing, begin) if closing else -1
    shown = text[begin : end + len(tail)]
    # Only an end of the turn will do: anything else is not what the row says.
    if end < 0 or not content.strip().endswith(shown.strip()):
        return None
    return Answer(begin, end + len(tail + closing), shown.strip())
