"""Templates: what is written around a question and its answer, among them the tokenizer's own chat template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
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
DAY = "2024-07-26"
"""The day that chat templates write where no run has fixed another: the one that Llama 3's falls back to."""
OTHERS = 'use "alpaca", "plain" or your own text'
"""What can be done about a chat template that does not serve."""
TEMPLATE_ERRORS = (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError)
"""What a chat template may raise: by its own words, or because it reads what a message does not have."""


class Chatty(Protocol):
    """What is used of a tokenizer to fill in its chat template."""

    @property
    def chat_template(self) -> Any: ...
    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def get_chat_template(self, chat_template: Any = None, tools: Any = None) -> Any: ...


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


def render(
    turns: Sequence[Message],
    tokenizer: Chatty,
    *,
    place: str,
    date: str = DAY,
    tools: Any = None,
    open_answer: bool = False,
) -> str:
    """Return a conversation as the tokenizer's chat template writes it; `open_answer`: up to where an answer begins.

    Raises: ConfigError with the template's own words if it refuses the conversation, which is that of `place`.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=open_answer, **render_options(tokenizer, date, tools)
        )
    except TEMPLATE_ERRORS as error:
        roles = ", ".join(str(turn.get("role")) for turn in turns)
        words = " ".join(str(error).split())[:200] or type(error).__name__
        expected = "turns that the tokenizer's chat template takes"
        got = f"{words!r} from it for {place} ({roles})"
        raise ConfigError(Fault("data.template", expected, got, f"change the turns, or {OTHERS}")) from error
    return text


def render_options(tokenizer: Chatty, date: str, tools: Any = None) -> Mapping[str, Any]:
    """Return the arguments by which a chat template writes a given day, and knows the tools; few templates need any."""
    options = {} if tools is None else {"tools": tools}
    if writes_date(tokenizer):
        options["chat_template"] = clock(date) + chat_template_of(tokenizer, tools)
    return options


def chat_template_of(tokenizer: Chatty, tools: Any = None) -> str:
    """Return the text of a tokenizer's chat template; of several the one that transformers takes."""
    template: str = tokenizer.get_chat_template(tools=tools) if tokenizer.chat_template is not None else ""
    return template


def writes_date(tokenizer: Chatty) -> bool:
    """Return whether the tokenizer's chat template asks for the day, as several families' do."""
    return "strftime_now" in str(tokenizer.chat_template)


@lru_cache(maxsize=8)
def clock(date: str) -> str:
    """Return the start of a template in which `strftime_now` gives midnight of a day, in ISO format, in any format."""
    # As a macro, which hides the function of this name: transformers gives templates nothing that can be called.
    moment = datetime.fromisoformat(date)
    codes = [*"aAwdbBmyYHIpMSfzZjUWcxXGuV", *(f"-{code}" for code in "dmHIMSjUWy"), "e", "D", "F", "T", "R"]
    text = "format | replace('%%', '\x00')"
    for code in codes:
        value = moment.strftime(f"%{code}").replace("\\", "\\\\").replace("'", "\\'")
        text += f" | replace('%{code}', '{value}')"
    # What ends the macro must not be a block: Jinja would drop a line break that follows, the template's own.
    return f"{{% macro strftime_now(format) %}}{{{{ {text} | replace('\x00', '%') }}}}{{% endmacro %}}{{{{ '' }}}}"


def user(text: str) -> Message:
    """Return a turn of the user."""
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    """Return a turn of the assistant."""
    return {"role": "assistant", "content": text}


def join(first: str, second: str, separator: str) -> str:
    return separator.join(part for part in (first, second) if part)
