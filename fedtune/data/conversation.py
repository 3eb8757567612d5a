"""Conversations as people store them: turns by role, in the spelling of the hub or of ShareGPT, checked and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fedtune.data.templates import Message
from fedtune.errors import type_of

ROLES: Mapping[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Roles by the names that data sets give them."""
EXTRAS = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "reasoning", "weight")
"""What a turn may hold beside role and text; chat templates read it."""


class ConversationError(ValueError):
    """A value is no conversation; the message says why, in the words of an error's second part."""


def write_turns(value: Any) -> str:
    """Return a conversation as JSON, its turns with the keys role and content.

    Turns may also be spelled as ShareGPT does (`from` and `value`), with its roles. Texts in parts are joined, system
    turns without text are left out.

    Raises: ConversationError if it is no list of turns, or a turn has no known role or no text.
    """
    if isinstance(value, str):  # some data sets hold JSON in a column of text
        try:
            value = json.loads(value)
        except ValueError as error:
            raise ConversationError(f"text that is no JSON ({value[:40]!r})") from error
    if isinstance(value, Mapping) and isinstance(value.get("messages"), list):
        value = value["messages"]
    if value is None:
        raise ConversationError("nothing")
    if not isinstance(value, list):
        raise ConversationError(f"{type_of(value)} ({str(value)[:40]!r})")
    turns = [turn for number, raw in enumerate(value, start=1) for turn in _turn(raw, number)]
    if not turns:
        raise ConversationError("no turn")
    text = json.dumps(turns, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConversationError("half of a surrogate pair, which is no character,") from error
    return text


def read_turns(text: str) -> Sequence[Message]:
    """Return the turns that `write_turns` wrote."""
    turns: Sequence[Message] = json.loads(text)
    return turns


def from_prompt(prompt: Any, completion: Any) -> Sequence[Any]:
    """Return prompt and completion, each a text or a list of turns, as one list of turns."""
    first = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    last = completion if isinstance(completion, list) else [{"role": "assistant", "content": completion}]
    return [*first, *last]


def _turn(raw: Any, number: int) -> Iterator[Message]:
    """Yield a turn with the keys that chat templates read; nothing for a system turn without text."""
    if not isinstance(raw, Mapping):
        raise ConversationError(f"{type_of(raw)} as turn {number}")
    name = raw.get("role", raw.get("from"))
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        raise ConversationError(f"role {str(name)[:40]!r} (known: {', '.join(ROLES)}) as turn {number}")
    content = _content(raw.get("content", raw.get("value")), number)
    extras = {key: without_nulls(raw[key]) for key in EXTRAS if raw.get(key) not in (None, [], "")}
    if isinstance(calls := extras.get("tool_calls"), list):
        extras["tool_calls"] = [_call(call) for call in calls]
    if not content.strip():
        if role == "system":
            return
        # A tool may have nothing to say.
        if not (role == "tool" or (role == "assistant" and "tool_calls" in extras)):
            raise ConversationError(f"no text as turn {number} ({name})")
    yield {"role": role, "content": content, **extras}


def without_nulls(value: Any) -> Any:
    """Return a value without the keys, at any depth, that hold nothing.

    Parquet gives every row's structure the keys of all rows: a tool would seem to have the arguments of every other.

    >>> without_nulls([{"name": "add", "arguments": {"a": 1, "city": None}}])
    [{'name': 'add', 'arguments': {'a': 1}}]
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _call(call: Any) -> Any:
    """Return a call of a tool whose arguments are an object: chat templates would write OpenAI's text of one twice."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def _content(value: Any, number: int) -> str:
    """Return a turn's text; one in parts is joined."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text", "")) for part in value)
    raise ConversationError(f"{type_of(value)} that is no text ({str(value)[:40]!r}) as turn {number}")
