"""Rows of benchmarks, made by the tests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedtune.evaluation.files import Row


def rows(*values: Mapping[str, Any]) -> Sequence[Row]:
    return [Row(f"file row {number}", value) for number, value in enumerate(values, 1)]


def write(path: Path, *values: Mapping[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def mmlu_row(number: int = 0, subject: str = "high_school_sums", **changes: Any) -> dict[str, Any]:
    choices = [str(number + k) for k in range(4)]
    return {"question": f"{number}+1=?", "choices": choices, "answer": 1, "subject": subject} | changes


def arc_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    choices = {"text": ["a dog", "the quick fox", "no"], "label": ["A", "B", "C"]}
    return {"question": f"who runs {number}?", "choices": choices, "answerKey": "B"} | changes


def gsm8k_row(number: int = 0, **changes: Any) -> dict[str, Any]:
    answer = f"{number}+1=<<{number}+1={number + 1}>>{number + 1}\n#### {number + 1}"
    return {"question": f"What is {number} plus 1?", "answer": answer} | changes


def humaneval_row(**changes: Any) -> dict[str, Any]:
    test = "def check(candidate):\n    assert candidate(1, 2) == 3\n"
    return {"prompt": 'def add(a, b):\n    """Add."""\n', "test": test, "entry_point": "add"} | changes
