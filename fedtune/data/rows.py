"""From the columns of a file to the parts that a task uses, every cell checked and as text."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedtune.data.conversation import ConversationError, from_prompt, without_nulls, write_turns
from fedtune.data.pairs import BOTH, holds_turns, read_pairs
from fedtune.data.presets import columns_of
from fedtune.data.settings import GROUP, DataSettings, Part, Task
from fedtune.data.table import Table
from fedtune.errors import ConfigError, Fault

CONVERSATIONS = ("messages", "conversations", "conversation")
"""Columns that hold conversations by name: of the hub's chat data sets, and of ShareGPT's."""
FORMS: Mapping[Task, str] = {
    "causal": (
        "messages (or conversations); instruction, input (if any) and output; prompt and completion; text alone; or "
        "chosen and rejected behind an instruction or prompt (if any), for the objective 'dpo'"
    ),
    "classification": "label, and text or instruction with input (if any)",
}
"""The columns that a row may have, by task."""
ALONE: Mapping[str, Sequence[Part]] = {
    "messages": ("text", "instruction", "input", "output"),
    "output": ("text",),
    "chosen": ("text", "output", "messages"),
    "rejected": ("text", "output", "messages"),
}
"""Parts that cannot be mapped beside another one."""


@dataclass(frozen=True)
class Chosen:
    """The columns of one file that are used."""

    columns: Mapping[Part, str]
    """By part, the column's name."""
    note: str = ""
    """What a user should know of columns that are not used; empty if nothing."""


def choose(settings: DataSettings, names: Sequence[str], where: str, task: Task) -> Chosen:
    """Return the columns that a task uses of those that there are.

    What `data.fields` maps comes first. Of the others, those of one form of row are used: a column that merely has the
    name of a part beside them is not.

    Raises: ConfigError naming the columns that there are, if a mapped one is absent or none make up a row.
    """
    for part, column in settings.fields.items():
        if column not in names:
            raise ConfigError(absent(f"data.fields.{part}", column, names, where))
    mapped = dict(settings.fields)
    if task == "classification":
        return _for_classes(mapped, names, where)
    if settings.preset is not None:
        mapped = {**columns_of(settings.preset, names, where, mapped=mapped), **mapped}
    return _for_causal(mapped, names, where)


def _for_classes(mapped: dict[Part, str], names: Sequence[str], where: str) -> Chosen:
    if "label" not in {*mapped, *names}:
        expected = "a column for label, which classification needs"
        raise ConfigError(Fault("data.fields.label", expected, _columns_of(names, where), _map("label")))
    if talk := [part for part in ("messages", "tools", *BOTH) if part in mapped]:
        expected = "no entry for classification, which reads no conversations and no pairs of answers"
        raise ConfigError(Fault(f"data.fields.{talk[0]}", expected, repr(mapped[talk[0]]), "map text and label"))
    label = mapped.get("label", "label")
    if "text" in mapped or ("text" in names and "instruction" not in mapped):
        # An `input` is the second of a pair only where it is said to be: beside a text it may be anything.
        parts: dict[Part, str] = {"text": mapped.get("text", "text")}
        if "input" in mapped:
            parts["input"] = mapped["input"]
    elif "instruction" in {*mapped, *names}:
        parts = {part: mapped.get(part, part) for part in _pair(mapped, names)}
    else:
        expected = "a column for text, which classification needs"
        raise ConfigError(Fault("data.fields.text", expected, _columns_of(names, where), _map("text")))
    spare = [part for part in ("instruction", "input") if part in names]
    return Chosen({**parts, "label": label}, note=_note({**parts, "label": label}, spare, names))


def _pair(mapped: Mapping[Part, str], names: Sequence[str]) -> Iterator[Part]:
    yield "instruction"
    if "input" in {*mapped, *names}:
        yield "input"


def _for_causal(mapped: dict[Part, str], names: Sequence[str], where: str) -> Chosen:
    for part, others in ALONE.items():
        if part in mapped and (both := [other for other in others if other in mapped]):
            got = f"{part} and {both[0]}"
            raise ConfigError(Fault(f"data.fields.{both[0]}", "columns of one form of row", got, "map one of them"))
    free = [name for name in names if name not in mapped.values()]
    if {*BOTH} & {*mapped}:
        return _for_preferences(mapped, free, names, where)
    talk = mapped.get("messages") or next((name for name in CONVERSATIONS if name in free), None)
    if "messages" in mapped or (talk and not {"text", "output", "instruction"} & {*mapped}):
        assert talk is not None
        parts: dict[Part, str] = {"messages": talk}
        if "tools" in {*mapped, *free}:
            parts["tools"] = mapped.get("tools", "tools")
        spare = [name for name in ("text", "output", "completion", "system") if name in free]
        return Chosen(parts, note=_note(parts, spare, names))
    if "output" in mapped or ("output" in free and "text" not in mapped):
        parts = {part: mapped.get(part, part) for part in _exchange(mapped, free)}
        return Chosen(
            parts,
            note=_note(parts, [name for name in ("text", "completion", "system", "history") if name in free], names),
        )
    if {"prompt", "completion"} <= {*free} and "text" not in mapped:
        parts = {"instruction": "prompt", "output": "completion"}
        return Chosen(parts, note=_note(parts, [name for name in ("text",) if name in free], names))
    if {*BOTH} <= {*free} and not {"text", "messages"} & {*mapped, *free}:
        return _for_preferences(mapped, free, names, where)
    if "text" in {*mapped, *free}:
        parts = {"text": mapped.get("text", "text")}
        return Chosen(parts, note=_note(parts, [name for name in ("instruction", "input") if name in free], names))
    hint = f"a row is one of {FORMS['causal']}; map yours with fields = {{ instruction = ..., output = ... }}"
    expected = "a column for output, or one for text, or one for messages"
    raise ConfigError(Fault("data.fields.output", expected, _columns_of(names, where), hint))


def _for_preferences(mapped: dict[Part, str], free: Sequence[str], names: Sequence[str], where: str) -> Chosen:
    """Return the columns of a prompt, if there is any, and of the two answers to it.

    Raises: ConfigError if one of the answers has no column.
    """
    parts: dict[Part, str] = {}
    for part, others in {"instruction": ("prompt",), "input": (), "chosen": (), "rejected": ()}.items():
        own: Part = part  # type: ignore[assignment]  # the keys above are parts
        if column := mapped.get(own) or next((name for name in (own, *others) if name in free), None):
            parts[own] = column
    if missing := [part for part in BOTH if part not in parts]:
        expected = f"a column for {missing[0]}, which the objective 'dpo' compares with the other answer"
        raise ConfigError(Fault(f"data.fields.{missing[0]}", expected, _columns_of(names, where), _map(missing[0])))
    return Chosen(parts, note=_note(parts, [name for name in ("text", "output", "messages") if name in free], names))


def _exchange(mapped: Mapping[Part, str], free: Sequence[str]) -> Iterator[Part]:
    parts: tuple[Part, ...] = ("instruction", "input", "output")
    yield from (part for part in parts if part == "output" or part in mapped or part in free)


def _note(parts: Mapping[Part, str], spare: Sequence[str], names: Sequence[str]) -> str:
    beside = [name for name in spare if name in names and name not in parts.values()]
    if not beside:
        return ""
    used, others = ", ".join(parts.values()), ", ".join(beside)
    return f"data.fields: rows are read from {used}; not used: {others} (map it with data.fields if it is meant)"


def read_parts(chosen: Chosen, table: Table, where: str) -> Mapping[str, Sequence[str]]:
    """Return the parts of a table as text, conversations as JSON.

    Raises: ConfigError naming row and column of a cell from which nothing can be learned.
    """
    columns = {part: table.column(column) for part, column in chosen.columns.items()}
    places = {part: f"column {column!r} of {where}" for part, column in chosen.columns.items()}
    if "rejected" in columns:
        return _preferences(columns, places)
    asked, answers = columns.get("instruction", ()), columns.get("output", ())
    if any(isinstance(value, list) for value in (*asked[:1], *answers[:1])):  # each the turns of a conversation
        pairs = zip(asked, answers, strict=True)
        return {"messages": [_turns(from_prompt(*pair), row, places["output"]) for row, pair in enumerate(pairs)]}
    return {part: _READERS.get(part, partial(cells, part))(values, places[part]) for part, values in columns.items()}


def _preferences(columns: Mapping[Part, Sequence[Any]], places: Mapping[Part, str]) -> Mapping[str, Sequence[str]]:
    """Return rows with two answers in the form of other rows, the rejected answer beside them."""
    if holds_turns(columns):
        return read_pairs(columns, places)
    texts = {part: cells(part, values, places[part]) for part, values in columns.items()}
    # Without a prompt both answers are whole texts, which begin alike.
    name = "output" if {"instruction", "input"} & {*texts} else "text"
    return {name if part == "chosen" else part: values for part, values in texts.items()}


def conversations(values: Sequence[Any], where: str) -> list[str]:
    """Return a column of conversations as JSON.

    Raises: ConfigError naming the first row that is none.
    """
    return [_turns(value, row, where) for row, value in enumerate(values)]


def tools(values: Sequence[Any], where: str) -> list[str]:
    """Return a column of the tools that conversations may call, lists of JSON schemas, as JSON; empty for none.

    Raises: ConfigError naming the first row that is none.
    """
    texts = []
    for row, value in enumerate(values):
        try:
            schemas = json.loads(value or "null") if isinstance(value, str | None) else value
        except ValueError:
            schemas = False
        if schemas and not (isinstance(schemas, list) and all(isinstance(schema, Mapping) for schema in schemas)):
            schemas = False
        if schemas is False:
            got = f"{str(value)[:60]!r} in row {row + 1} of {where}"
            raise ConfigError(Fault("data.fields.tools", "a list of JSON schemas, or nothing", got))
        texts.append(json.dumps(without_nulls(schemas), ensure_ascii=False) if schemas else "")
    return texts


_READERS: Mapping[str, Callable[[Sequence[Any], str], list[str]]] = {"messages": conversations, "tools": tools}
"""How a part is read that is no plain text."""


def _turns(value: Any, row: int, where: str) -> str:
    try:
        return write_turns(value)
    except ConversationError as error:
        got = f"{error} in row {row + 1} of {where}"
        raise ConfigError(
            Fault("data.fields.messages", "a list of turns, each with its role and its text", got)
        ) from error


def cells(part: str, values: Sequence[Any], where: str) -> list[str]:
    """Return a column's values as text.

    Raises: ConfigError naming the first row whose value is nothing to learn from, and how many there are.
    """
    texts = [_cell(part, value) for value in values]
    usable = [text for text in texts if text is not None]
    if len(usable) == len(texts):
        return usable
    row = texts.index(None)
    got = f"{str(values[row])[:60]!r} in row {row + 1} of {where} ({len(texts) - len(usable)} such of {len(texts)})"
    key = "data.split.by" if part == GROUP else f"data.fields.{part}"
    raise ConfigError(Fault(key, "text or a whole number in every row", got, "fill or remove these rows"))


def _cell(part: str, value: object) -> str | None:
    """Return the value as text, or None if it is nothing to learn from; only `input` may be empty or missing."""
    if value is None:
        return "" if part == "input" else None
    if isinstance(value, float) and value.is_integer():  # whole numbers beside missing ones are stored as floats
        value = int(value)
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str) or (part != "input" and not value.strip()):
        return None
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair, which is no character
        return None
    return value


def absent(key: str, column: str, names: Sequence[str], where: str) -> Fault:
    """Return the fault of a column that a key names and a file lacks, with the nearest one that it has."""
    near = difflib.get_close_matches(column, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "map a column that is there with fields = {...}"
    return Fault(key, f"column {column!r}", _columns_of(names, where), hint)


def _columns_of(names: Sequence[str], where: str) -> str:
    return f"{', '.join(names) or 'none'} in {where}"


def _map(part: str) -> str:
    return f"map it with fields = {{ {part} = ... }}"
