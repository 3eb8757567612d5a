"""MMLU (arXiv 2009.03300) and ARC (arXiv 1803.05457), scored by the likelihood of each option; prompts as lm-eval's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedtune.evaluation.files import Row
from fedtune.evaluation.items import Question, few_shot

LETTERS = "ABCD"
MMLU_INTRODUCTION = "The following are multiple choice questions (with answers) about {subject}.\n\n"


def mmlu(rows: Sequence[Row], shot_rows: Sequence[Row], shots: int) -> Sequence[Question]:
    """Return MMLU's questions, each after the first `shots` rows of its own subject.

    Raises:
        ConfigError: naming the row that is no such question, or the subject that has fewer rows to show.
    """
    shown: dict[str, list[tuple[str, str]]] = {}
    for row in shot_rows:
        subject, question, gold = mmlu_row(row)
        shown.setdefault(subject, []).append((question, f" {LETTERS[gold]}"))
    questions = []
    for row in rows:
        subject, question, gold = mmlu_row(row)
        own = shown.get(subject, [])[:shots]
        if len(own) < shots:
            hint = f"set --shots mmlu={len(own)}, or give a file with more rows of it: --data mmlu.shots=FILE"
            raise row.fault(f"{shots} shots of the subject {subject!r}", str(len(own)), hint)
        introduction = MMLU_INTRODUCTION.format(subject=" ".join(subject.split("_")))
        prompt = few_shot(introduction, own, question)
        questions.append(Question(row.place, prompt, [f" {letter}" for letter in LETTERS], gold, subject))
    return questions


def mmlu_row(row: Row) -> tuple[str, str, int]:
    """Return (subject, question with its options, place of the right one)."""
    name, value = row.first("choices")
    options = row.texts(name, value)
    if len(options) != len(LETTERS):
        raise row.fault("four choices", str(len(options)))
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=True)]
    text = "\n".join([row.text("question").strip(), *lines, "Answer:"])
    return row.text("subject"), text, place_of(row, row.first("answer")[1], LETTERS)


def arc(rows: Sequence[Row], shot_rows: Sequence[Row], shots: int) -> Sequence[Question]:
    """Return ARC's questions, each after the first `shots` rows of the shown file.

    Raises:
        ConfigError: naming the row that is no such question, or that there are fewer rows to show.
    """
    shown = []
    for row in shot_rows[:shots]:
        question, options, gold = arc_row(row)
        shown.append((question, options[gold]))
    questions = []
    for row in rows:
        if len(shown) < shots:
            raise row.fault(f"{shots} shots", str(len(shown)), "lower --shots arc=N")
        question, options, gold = arc_row(row)
        questions.append(Question(row.place, few_shot("", shown, question), options, gold))
    return questions


def arc_row(row: Row) -> tuple[str, Sequence[str], int]:
    """Return (question, options with their blank, place of the right one)."""
    _, choices = row.first("choices")
    if not isinstance(choices, Mapping):
        raise row.fault("choices with text and label", "something else")
    texts = row.texts("choices.text", choices.get("text"))
    labels = row.texts("choices.label", choices.get("label"))
    if len(labels) != len(texts) or len(set(labels)) != len(labels):
        raise row.fault("a label of its own for each choice", f"{len(texts)} texts and the labels {labels}")
    gold = place_of(row, row.first("answerKey")[1], labels)
    return f"Question: {row.text('question')}\nAnswer:", [f" {text}" for text in texts], gold


def place_of(row: Row, answer: object, labels: Sequence[str]) -> int:
    """Return the place of the right option, which a file names by its label or by its place."""
    # A number is a label where labels are numbers: of the labels 1 to 4, 1 is the first option.
    if isinstance(answer, str | int) and not isinstance(answer, bool) and str(answer) in list(labels):
        return list(labels).index(str(answer))
    number = int(answer) if isinstance(answer, str) and answer.isdecimal() and labels == LETTERS else answer
    numbered = any(label.isdecimal() for label in labels)
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(labels) and not numbered:
        return number
    raise row.fault(f"an answer of {', '.join(labels)} or its place from 0", repr(answer)[:80])


def choose(question: Question, likelihoods: Sequence[float]) -> Mapping[str, int]:
    """Return which option a model chooses: `acc` by log-likelihood, `acc_norm` by that over the option's characters.

    Of equal ones the first, as lm-eval's argmax does; the leading blank is not a character of the option.
    """
    lengths = [len(option) - 1 for option in question.options]
    return {
        "acc": int(np.argmax(likelihoods)),
        "acc_norm": int(np.argmax(np.asarray(likelihoods) / lengths)),
    }
