"""Benchmark scores as a table of 80 columns: each with its interval, before beside after, and how many items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from fedtune.terminal.summary import grid
from fedtune.terminal.text import printable

QUICK = "quick scores with 95 % intervals: compare them with each other"
VIEWS = {"base": "base", "before": "before", "after": "after", "difference": "change"}


def task_table(scores: Mapping[str, Any]) -> Table:
    """Return one row per task and measure."""
    tasks: Mapping[str, Any] = scores["tasks"]
    views = [view for view in VIEWS if any(view in m for t in tasks.values() for m in t["measures"].values())]
    title = QUICK if scores["quick"] else f"scores of lm-eval {scores['lm_eval']} with 95 % intervals"
    table = grid(title, "task", *(VIEWS[view] for view in views), "items", second="measure")
    for name, task in tasks.items():
        for number, (measure, estimates) in enumerate(task["measures"].items()):
            cells = [interval(estimates[view], signed=view == "difference") for view in views]
            items = next(iter(estimates.values()))["items"]
            table.add_row("" if number else printable(name), measure, *cells, str(items))
    return table


def interval(estimate: Mapping[str, Any], *, signed: bool = False) -> str:
    """Return a score and its interval.

    >>> interval({"value": 0.25, "low": 0.2, "high": 0.312}), interval({"value": 0.1, "low": None}, signed=True)
    ('.250 [.200 .312]', '+.100')
    """
    value = short(estimate["value"], signed=signed)
    if estimate["low"] is None:
        return value
    return f"{value} [{short(estimate['low'])} {short(estimate['high'])}]"


def short(number: float, *, signed: bool = False) -> str:
    # Four characters each, so that three intervals fit a line: .250 and 1.00.
    text = f"{number:{'+' if signed else ''}.3f}"
    return text.replace("0.", ".", 1) if abs(number) < 0.9995 else text[:-1]


def remarks(scores: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each task that says how it was asked."""
    for name, task in scores["tasks"].items():
        answer = f", at most {task['new_tokens']} tokens" if "new_tokens" in task else ""
        left = f", {task['too_long']} too long and left out" if task["too_long"] else ""
        asked = task["items"] + task["too_long"]
        drawn = f", {asked} drawn of {task['rows']}" if asked < task["rows"] else ""
        yield printable(f"{name}: {task['shots']} shots, {task['method']}{answer}{drawn}{left}")
