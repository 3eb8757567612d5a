"""Templates: what is written around a question and its answer, among them the tokenizer's own chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from jinja2.exceptions import TemplateError

from fedtune.data.settings import DataSettings
from fedtune.errors import ConfigError, Fault

Message = Mapping[str, Any]
"""One turn of a conversation: `role` and `content`, and what else the chat template reads of it."""

# Stanford Alpaca, train.py: the answer follows the last colon directly.
ALPACA = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:{output}"
)
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:{output}"
)
OTHERS = 'use "alpaca", "plain" or your own text'
"""What can be done about a chat template that does not serve."""
TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
"""What a chat template may raise: by its own words, or because it reads what a message does not have."""


class Chatty(Protocol):
    """What is used of a tokenizer to fill in its chat template."""

    chat_template: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


def template_of(settings: DataSettings, tokenizer: Chatty) -> str:
    """Return the template that the settings mean with a tokenizer: never `auto`.

    Raises: ConfigError if it is `chat` and the tokenizer has no chat template.
    """
    if settings.template == "auto":
        return "alpaca" if tokenizer.chat_template is None else "chat"
    if settings.template == "chat" and tokenizer.chat_template is None:
        expected = "a template the tokenizer can fill: it has no chat template"
        raise ConfigError(Fault("data.template", expected, "'chat'", OTHERS))
    return settings.template


def prompt_of(template: str, instruction: str, context: str) -> str:
    r"""Return what stands before the answer, by any template but that of the tokenizer.

    >>> prompt_of("plain", "Translate.", "bonjour"), prompt_of("Q: {instruction} A: {output}", "why", "")
    ('Translate.\\nbonjour\\n', 'Q: why A: ')
    """
    if template == "plain":
        return join(instruction, context, "\n") + "\n"
    if template == "alpaca":
        template = ALPACA_INPUT if context else ALPACA
    values = {"instruction": instruction, "input": context}
    # All at once: an instruction may itself hold the text {input}.
    return re.sub(r"\{(instruction|input)\}", lambda match: values[match[1]], template.removesuffix("{output}"))


def render(turns: Sequence[Message], tokenizer: Chatty, *, place: str, open_answer: bool = False) -> str:
    """Return a conversation as the tokenizer's chat template writes it; `open_answer`: up to where an answer begins.

    Raises: ConfigError with the template's own words if it refuses the conversation, which is that of `place`.
    """
    try:
        text: str = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=open_answer)
    except TEMPLATE_ERRORS as error:
        roles = ", ".join(str(turn.get("role")) for turn in turns)
        words = " ".join(str(error).split())[:200] or type(error).__name__
        expected = "turns that the tokenizer's chat template takes"
        got = f"{words!r} from it for {place} ({roles})"
        raise ConfigError(Fault("data.template", expected, got, f"change the turns, or {OTHERS}")) from error
    return text


def join(first: str, second: str, separator: str) -> str:
    return separator.join(part for part in (first, second) if part)
