"""What a benchmark asks: questions with options, problems to be answered in words, and programs to be completed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Question:
    """A text with several continuations, of which the model should find the right one the most likely."""

    place: str
    """File and row, for messages."""
    prompt: str
    """Without a blank at its end: that belongs to the options."""
    options: Sequence[str]
    """Each with the blank that it begins with, as the shots write their answers."""
    gold: int
    """Place of the right one."""
    group: str = ""
    """Subject; empty where a benchmark has none."""


@dataclass(frozen=True)
class Problem:
    """A text that the model continues by an answer of its own."""

    place: str
    prompt: str
    gold: str
    """The right answer, as the benchmark compares it."""
    extra: Mapping[str, str] = field(default_factory=dict)
    """What else scoring needs, such as the tests of a program."""


def few_shot(description: str, shots: Sequence[tuple[str, str]], question: str) -> str:
    r"""Return a prompt: description, answered questions and then the question, an empty line between them.

    >>> few_shot("", [("1+1=", " 2")], "1+2=")
    '1+1= 2\n\n1+2='
    """
    return description + "".join(f"{text}{answer}\n\n" for text, answer in shots) + question
