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
            cells = [interval(estimates.get(view), signed=view == "difference") for view in views]
            items = next(iter(estimates.values()))["items"]
            table.add_row("" if number else printable(name), measure, *cells, str(items))
    return table


def interval(estimate: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Return a score and its interval; nothing for none.

    >>> interval({"value": 0.25, "low": 0.2, "high": 0.312}), interval({"value": 0.1, "low": None}, signed=True)
    ('.250 [.200 .312]', '+.100')
    """
    if estimate is None:
        return ""
    value = short(estimate["value"], signed=signed)
    if estimate["low"] is None:
        return value
    return f"{value} [{short(estimate['low'])} {short(estimate['high'])}]"


def short(number: float, *, signed: bool = False) -> str:
    """Return a number in four characters beside its sign, so that three intervals fit a line.

    >>> [short(number) for number in (0.25, 1, 3.1416, 20.35, 123.4, 0.99996)]
    ['.250', '1.00', '3.14', '20.4', '123', '1.00']
    """
    digits = next((digits for limit, digits in ((0.9995, 3), (9.995, 2), (99.95, 1)) if abs(number) < limit), 0)
    text = f"{number:{'+' if signed else ''}.{digits}f}"
    return text.replace("0.", ".", 1) if digits == 3 else text


def remarks(scores: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each task that says how it was asked."""
    for name, task in scores["tasks"].items():
        answer = f", at most {task['new_tokens']} tokens" if "new_tokens" in task else ""
        left = f", {task['too_long']} too long and left out" if task["too_long"] else ""
        shots = f"{task['shots']} shots, " if "file" in task else ""
        asked = task["items"] + task["too_long"]
        drawn = f", {asked} drawn of {task['rows']}" if asked < task["rows"] else ""
        if "samples" in task:
            asked_for = f"{task['samples']} samples at temperature {task['temperature']:g}"
            yield printable(f"{name}: {asked_for}; {outcomes(task)}")
        yield printable(f"{name}: {shots}{task['method']}{answer}{drawn}{left}")


def outcomes(task: Mapping[str, Any]) -> str:
    """Return how many programs ran out of memory, which are no samples, and out of time, which have failed."""
    memory, time = sum(task["out_of_memory"].values()), sum(task["timeouts"].values())
    place = "confined" if task["limits"]["confined"] else "not confined"
    return f"{place}; {memory} programs out of memory and not counted, {time} out of time"
