"""Tables of messages, numbered reasons, exceptions and lines of rounds.jsonl, from the schema and the code."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path

from fedtune import errors
from fedtune.config.key_facts import field_texts
from fedtune.rounds import record

SCHEMA = Path(__file__).parents[1] / "proto" / "fedtune" / "v1"


@cache
def schema_blocks(file: str) -> Mapping[str, tuple[str, str]]:
    """Return the enums and messages of a schema file by name, each as its comment and its body."""
    text = (SCHEMA / file).read_text()
    pattern = re.compile(r"((?:^//[^\n]*\n)*)^(?:enum|message|service) (\w+) \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
    return {
        name: (" ".join(line.removeprefix("//").strip() for line in comment.splitlines()), body)
        for comment, name, body in pattern.findall(text)
    }


def enum_table(file: str, name: str) -> str:
    """Return the values of an enum of the schema as a Markdown table."""
    _, body = schema_blocks(file)[name]
    rows = ["| number | name | meaning |", "|---|---|---|"]
    for value, number, comment in re.findall(r"^ *(\w+) = (\d+);(?: *// *(.*))?$", body, flags=re.MULTILINE):
        if number != "0" or not value.endswith("UNSET"):
            rows.append(f"| {number} | `{value}` | {comment or value.replace('_', ' ').lower()} |")
    return "\n".join(rows)


def message_blocks(file: str) -> str:
    """Return every message and enum of a schema file with its comment."""
    parts = []
    for name, (comment, body) in schema_blocks(file).items():
        kind = "enum" if re.search(r"^ *[A-Z_0-9]+ = \d+;", body, re.MULTILINE) else "message"
        kind = "service" if "rpc " in body else kind
        parts.append(f"### {name}\n\n{comment}\n\n```proto\n{kind} {name} {{\n{body}}}\n```")
    return "\n\n".join(parts)


def exception_table() -> str:
    """Return the exceptions of `fedtune.errors` as a Markdown table."""
    rows = ["| exception | raised when |", "|---|---|"]
    for name, cls in vars(errors).items():
        if isinstance(cls, type) and issubclass(cls, errors.FedtuneError):
            rows.append(f"| `{name}` | {inspect.cleandoc(cls.__doc__ or '').splitlines()[0]} |")
    return "\n".join(rows)


def record_table(name: str) -> str:
    """Return the keys of a record of rounds.jsonl as a Markdown table."""
    cls = getattr(record, name)
    texts = field_texts(cls)
    rows = ["| key | content |", "|---|---|"]
    for field in fields(cls):
        text = " ".join(texts[field.name].split()).replace("|", "\\|")
        rows.append(f"| `{field.metadata.get('key', field.name)}` | {text} |")
    return "\n".join(rows)
