from __future__ import annotations

from dataclasses import asdict
from io import StringIO
from typing import Any

from rich.console import Console

from fedtune.evaluation import intervals
from fedtune.terminal.task_table import interval, remarks, task_table


def estimates(*values: float) -> dict[str, Any]:
    before, after = [1.0, 0.0] * 20, [*values] * 20
    return {
        "before": asdict(intervals.share(before)),
        "after": asdict(intervals.share(after)),
        "difference": asdict(intervals.difference(before, after)),
    }


def scores(**changes: Any) -> dict[str, Any]:
    task = {"file": "x", "shots": 5, "method": "greedy", "rows": 100, "items": 40, "too_long": 0, "new_tokens": 256}
    return {"quick": True, "tasks": {"gsm8k": {**task, "measures": {"flexible": estimates(1.0, 1.0)}, **changes}}}


def test_a_table_fits_eighty_columns_and_shows_every_interval() -> None:
    out = StringIO()
    Console(file=out, width=80).print(task_table(scores()))
    text = out.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    for part in ("gsm8k", "flexible", ".500 [.352 .648]", "1.00 [.912 1.00]", "+.500 [", "40", "quick"):
        assert part in text


def test_a_score_without_an_interval_stands_alone() -> None:
    assert interval({"value": -0.25, "low": None}, signed=True) == "-.250"
    assert interval({"value": -0.25, "low": -1.0, "high": 0.0}) == "-.250 [-1.00 .000]"


def test_a_remark_says_what_was_left_out() -> None:
    assert list(remarks(scores(too_long=2))) == [
        "gsm8k: 5 shots, greedy, at most 256 tokens, 42 drawn of 100, 2 too long and left out"
    ]
    assert list(remarks(scores(items=100))) == ["gsm8k: 5 shots, greedy, at most 256 tokens"]
