"""GSM8K (arXiv 2110.14168): worked problems in school arithmetic, answered greedily and compared as decimal numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from decimal import Decimal, InvalidOperation

from fedtune.evaluation.files import Row
from fedtune.evaluation.items import Problem, few_shot

MARK = "####"
"""Stands before the final answer."""
STOP = ("Question:", "\n\nQ:", "</s>", "<|im_end|>")
"""Where an answer ends at the latest: the model asks itself the next question."""
NUMBER = re.compile(
    # A minus after a word or a number is a difference: "5-3" ends in 3.
    r"(?:(?<![\w.)])[-\u2212]\$?|\$[-\u2212]?)?"
    r"(?:\d{1,3}(?:,\d{3})+(?!\d)(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)"
)


def problems(rows: Sequence[Row], shot_rows: Sequence[Row], shots: int) -> Sequence[Problem]:
    """Return the problems, all after the same `shots` first rows of the shown file, in its order.

    Raises:
        ConfigError: naming the row without question, answer or mark, or that there are fewer rows to show.
    """
    shown = [(question_of(row), " " + answer_of(row)) for row in shot_rows[:shots]]
    items = []
    for row in rows:
        if len(shown) < shots:
            raise row.fault(f"{shots} shots", str(len(shown)), "lower --shots gsm8k=N")
        gold = final_number(answer_of(row))
        if gold is None:
            raise row.fault(f"a number after {MARK} in the answer", repr(answer_of(row)[-60:]))
        items.append(Problem(row.place, few_shot("", shown, question_of(row)), str(gold)))
    return items


def question_of(row: Row) -> str:
    return f"Question: {row.text('question', 'instruction')}\nAnswer:"


def answer_of(row: Row) -> str:
    return row.text("answer", "output")


def final_number(text: str) -> Decimal | None:
    """Return the number right after the first mark; None without any.

    >>> final_number("2+2=4 #### 1,004.0"), final_number("4")
    (Decimal('1004.0'), None)
    """
    _, mark, rest = text.partition(MARK)
    match = NUMBER.match(rest.lstrip()) if mark else None
    return decimal(match[0]) if match else None


def last_number(text: str) -> Decimal | None:
    """Return the last number of a text; None without any.

    >>> last_number("so 7 - 3 = $4."), last_number("none")
    (Decimal('4'), None)
    """
    matches = NUMBER.findall(text)
    return decimal(matches[-1]) if matches else None


def decimal(text: str) -> Decimal | None:
    """Return a number as it is written in English; None for what is none.

    >>> decimal("-$1,000.50"), decimal("$")
    (Decimal('-1000.50'), None)
    """
    try:
        return Decimal(re.sub(r"[$,\s]", "", text.replace("\u2212", "-")))
    except InvalidOperation:
        return None


def scores(problem: Problem, answer: str) -> Mapping[str, float]:
    """Return whether an answer is right: `strict` by the number after the mark, `flexible` by the last number."""
    gold = Decimal(problem.gold)
    return {"strict": float(final_number(answer) == gold), "flexible": float(last_number(answer) == gold)}
