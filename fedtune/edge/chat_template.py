"""Filling in a tokenizer's chat template without transformers: the same text, in the same sandbox."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import nodes, pass_eval_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from fedtune.data.templates import DAY

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which templates and data sets know what a model thought; the first that a turn has is meant."""

Span = tuple[int, int]
"""Characters of a text: the first, and the one after the last."""


def fill_in(
    template: str,
    turns: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None,
    open_answer: bool,
    variables: Mapping[str, Any],
) -> tuple[str, Sequence[Span]]:
    """Return a conversation as its template writes it, and the spans that the template marks as written by the model.

    Args:
        template: text of the chat template; it comes with the base, and runs in a sandbox that gives it nothing to call
            and nothing to change.
        turns: of the conversation, at least one.
        tools: schemas of the tools that the assistant may call.
        open_answer: whether the text ends where an answer begins.
        variables: what the template may read beside these: the special tokens by name.

    Raises:
        ValueError: for a conversation without a turn.
        jinja2.exceptions.TemplateError: in the template's own words.
    """
    if not turns:
        raise ValueError("expected at least one turn of a conversation; got none")
    blocks, spans = list[str](), list[Span]()
    token = _MARKED.set((blocks, spans))
    try:
        written = _compile(template).generate(
            messages=[_plain_turn(turn) for turn in turns],
            tools=None if tools is None else list(tools),
            documents=None,
            add_generation_prompt=open_answer,
            **variables,
        )
        # One by one: a marked block counts the characters before it.
        for block in written:
            blocks.append(block)
    finally:
        _MARKED.reset(token)
    return "".join(blocks), spans


_MARKED: ContextVar[tuple[list[str], list[Span]]] = ContextVar("marked")
"""Blocks of the text that is being written, and the marked spans in it."""


class _Generation(Extension):
    """The tag `{% generation %}`, by which a template says what the model writes."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own declaration

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    @pass_eval_context
    def mark(self, context: nodes.EvalContext, caller: Callable[[], str]) -> str:
        text = caller()
        blocks, spans = _MARKED.get()
        begin = sum(map(len, blocks))
        spans.append((begin, begin + len(text)))
        return text


class _Namespace(Namespace):
    """Jinja's namespace without names that lead to Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"chat templates cannot store {name!r} on a namespace; please rename the attribute")
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> _Namespace:
    space = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        space[name] = value
    return space


@lru_cache(maxsize=8)
def _compile(template: str) -> Any:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": datetime.fromisoformat(DAY).strftime,  # a run's own day is written by data.templates.clock
        "dict": _dict,
        "namespace": _namespace,
    }
    return environment.from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Not jinja2's own, which escapes what a page would read as a tag.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    # A function, not the type: its attributes would be a way out of the sandbox.
    return dict(*args, **kwargs)


def _plain_turn(turn: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a turn without what is None, its reasoning under the names that templates read."""
    plain = {key: value for key, value in turn.items() if value is not None}
    reasoning = next((plain[key] for key in REASONING if key in plain), None)
    return plain if reasoning is None else {"thinking": reasoning, **plain, "reasoning_content": reasoning}
