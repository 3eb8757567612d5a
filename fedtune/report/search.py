"""The result of a search: what was tried, what it cost, how well early scores predict final ones, and the picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedtune.report.drawing import COLOURS, MARKERS, can_draw, new_figure, png, svg, tips, with_style
from fedtune.report.plots import axis_unit
from fedtune.report.rendering import Card, Table, render, replace_text
from fedtune.report.units import NOTHING, bytes_text, number_text, seconds_text
from fedtune.rounds.scores import LOWER_IS_BETTER
from fedtune.search.settings import Value
from fedtune.search.steps import Cost, Result, Search, best_result
from fedtune.store.typed_json import nan_to_null

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VERSION = 1
"""Of search.json."""
LEAST_PAIRS = 3
"""Trials of which a rank correlation says anything."""


def content_of(search: Search, results: Sequence[Result], *, name: str, ended: str = "") -> Mapping[str, Any]:
    """Return the content of search.json; all but the seconds are the same whenever the same search is run.

    Args:
        search: its settings.
        results: of all steps so far.
        name: of the recipe.
        ended: why it was stopped before its end; empty if it was not.
    """
    best = best_result(search, results)
    return {
        "version": VERSION,
        "name": name,
        "kind": search.settings.kind,
        "metric": search.settings.metric,
        "rounds": search.rounds,
        "rungs": list(search.rungs),
        "seed": search.seed,
        "state": "interrupted" if ended else "finished",
        "reason": ended,
        "trials": [trial_row(search, steps) for steps in ranked_trials(search, results)],
        "best": None if best is None else best.step.trial,
        "spent": total_cost(results),
        "curve": curve(search, results),
        "rank_correlation": rank_correlations(search, results),
    }


def ranked_trials(search: Search, results: Sequence[Result]) -> Sequence[Sequence[Result]]:
    """Return the results of each trial: first those that ran the most rounds, and of these the best first."""
    trials: dict[int, list[Result]] = {}
    for result in results:
        trials.setdefault(result.step.trial, []).append(result)
    last = {trial: steps[-1] for trial, steps in trials.items()}
    places = {result.step.trial: place for place, result in enumerate(search.order(list(last.values())))}
    behind = len(places)

    def key(trial: int) -> tuple[bool, int, int, int]:
        failed = last[trial].score is None
        return failed, -last[trial].step.until, places.get(trial, behind), trial

    return [trials[trial] for trial in sorted(trials, key=key)]


def trial_row(search: Search, steps: Sequence[Result]) -> Mapping[str, Any]:
    """Return what search.json says of one trial."""
    last, cost = steps[-1], sum_of(steps)
    state = "failed" if last.score is None else "finished" if last.step.until == search.rounds else "stopped"
    copied = [
        {"round": result.step.since, "trial": result.step.source, "values": dict(result.step.values)}
        for result in steps
        if result.step.source is not None
    ]
    return {
        "trial": last.step.trial,
        "values": dict(last.step.values),
        "state": state,
        "rounds": last.step.until if last.score is not None else max(last.scores, default=last.step.since),
        "score": last.score,
        "scores": {str(round): score for result in steps for round, score in sorted(result.scores.items())},
        "reason": last.reason,
        "segment": last.step.segment,
        "copied": copied,
        "state_digest": last.state,
        **asdict(cost),
    }


def sum_of(results: Sequence[Result]) -> Cost:
    return sum((result.cost for result in results), Cost())


def total_cost(results: Sequence[Result]) -> Mapping[str, Any]:
    """Return what the search itself has taken: every round of every trial, once."""
    last = {result.step.trial: result for result in results}
    failed = sum(result.score is None for result in last.values())
    return {**asdict(sum_of(results)), "trials": len(last), "failed": failed}


def curve(search: Search, results: Sequence[Result]) -> Sequence[Mapping[str, Any]]:
    """Return after each step what was spent so far, its score, and the best score so far."""
    cost, best, points = Cost(), None, []
    better = min if search.settings.metric in LOWER_IS_BETTER else max
    for result in results:
        cost = cost + result.cost
        if result.score is not None:
            best = result.score if best is None else better(best, result.score)
        points.append(
            {
                "trial": result.step.trial,
                "round": result.step.until,
                "client_rounds": cost.client_rounds,
                "bytes": cost.bytes_down + cost.bytes_up,
                "seconds": cost.seconds,
                "score": result.score,
                "best": best,
            }
        )
    return points


def rank_correlations(search: Search, results: Sequence[Result]) -> Sequence[Mapping[str, Any]]:
    """Return Spearman's correlation of the scores at each rung with the final ones, over the trials that have both.

    Of trials that a rung has chosen it is lower than of all: the ones that were stopped are missing.
    """
    final = {result.step.trial: result.score for result in results if result.step.until == search.rounds}
    early: dict[int, dict[int, float]] = {}
    for result in results:
        if not result.step.segment:
            for round, score in result.scores.items():
                early.setdefault(round, {})[result.step.trial] = score
    rows = []
    for rung in search.rungs[:-1]:
        pairs = [(score, end) for trial, score in early.get(rung, {}).items() if (end := final.get(trial)) is not None]
        value = spearman(*zip(*pairs, strict=True)) if len(pairs) >= LEAST_PAIRS else None
        rows.append({"rung": rung, "trials": len(pairs), "value": value})
    return rows


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return the correlation of the ranks of two lists, equal values with their mean rank; None where one is constant.

    >>> spearman([1, 2, 3], [10, 20, 90]), spearman([1, 2, 3, 4], [1, 1, 1, 1])
    (1.0, None)
    """
    a, b = ranks(first), ranks(second)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return round(float((a * b).sum()) / scale, 12) if scale else None


def ranks(values: Sequence[float]) -> Any:
    array = np.array(values, dtype=np.float64)
    below = (array[:, None] > array[None, :]).sum(axis=1)
    return below + ((array[:, None] == array[None, :]).sum(axis=1) - 1) / 2.0


def values_text(values: Mapping[str, Value]) -> str:
    """Return a trial's values in one line, by the last parts of their keys where these differ.

    >>> values_text({"client.learning_rate": 0.001, "adapter.rank": 8})
    'learning_rate 0.001, rank 8'
    """
    names = [key.rpartition(".")[2] for key in values]
    return ", ".join(
        f"{name if names.count(name) == 1 else key} {value:g}"
        if isinstance(value, float)
        else f"{name if names.count(name) == 1 else key} {value}"
        for (key, value), name in zip(values.items(), names, strict=True)
    )


def write_search(folder: Path, content: Mapping[str, Any]) -> Path:
    """Write search.json, search.png and search.html into a search's folder, and return the page's path."""
    replace_text(folder / "search.json", json.dumps(nan_to_null(content), indent=1) + "\n")
    cards = []
    if can_draw() and any(point["score"] is not None for point in content["curve"]):
        figure = picture(content)
        (folder / "search.png").write_bytes(png(figure))
        heading = "Scores by what the search had spent"
        drawing = svg(figure, name="search", title=heading)
        caption = "One mark per step of a trial; the line is the best score so far."
        cards.append(Card("search", heading, caption, drawing, None))
    page = folder / "search.html"
    text = render(
        "search.html.j2",
        title="fedtune search",
        heading=f"{content['name']}: {content['kind']}, {content['spent']['trials']} trials",
        content=content,
        trials=trial_table(content),
        spent=spent_table(content),
        correlations=correlation_table(content),
        cards=cards,
    )
    replace_text(page, text)
    return page


def trial_table(content: Mapping[str, Any]) -> Table:
    """Return one row per trial, the best first."""
    head = ["trial", "settings", "state", "rounds", content["metric"], "client-rounds", "down", "up", "time here"]
    rows = [
        [
            str(row["trial"]),
            values_text(row["values"]),
            f"{row['state']}{': ' + row['reason'] if row['reason'] else ''}",
            str(row["rounds"]),
            number_text(row["score"]),
            str(row["client_rounds"]),
            bytes_text(row["bytes_down"]),
            bytes_text(row["bytes_up"]),
            seconds_text(row["seconds"]),
        ]
        for row in content["trials"]
    ]
    return Table(head, rows, text_columns=3)


def spent_table(content: Mapping[str, Any]) -> Table:
    """Return what the search has taken in all."""
    total = content["spent"]
    row = [
        str(total["trials"]),
        str(total["failed"]),
        str(total["client_rounds"]),
        bytes_text(total["bytes_down"]),
        bytes_text(total["bytes_up"]),
        seconds_text(total["seconds"]),
    ]
    return Table(["trials", "failed", "client-rounds", "down", "up", "time here"], [row], text_columns=0)


def correlation_table(content: Mapping[str, Any]) -> Table | None:
    """Return how well the scores of each rung order the final ones; None without rungs."""
    rows = [
        [str(row["rung"]), str(row["trials"]), NOTHING if row["value"] is None else f"{row['value']:+.2f}"]
        for row in content["rank_correlation"]
    ]
    return (
        Table(["after round", "trials with a final score", "rank correlation"], rows, text_columns=0) if rows else None
    )


@with_style
def picture(content: Mapping[str, Any]) -> Figure:
    """Draw the score of every step, and the best so far, against client-rounds and against bytes."""
    figure = new_figure(9.6, 3.6)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, against in zip(panels, ("client_rounds", "bytes"), strict=True):
        draw_scores(axes, content, against)
    panels[0].set_ylabel(f"held-out {content['metric']}")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def draw_scores(axes: Axes, content: Mapping[str, Any], against: str) -> None:
    points = [point for point in content["curve"] if point["score"] is not None]
    unit = 1.0
    if against == "bytes":
        unit = axis_unit(axes, float(points[-1]["bytes"]), "bytes")
    else:
        axes.set_xlabel("client-rounds")
    x = np.array([point[against] / unit for point in points])
    axes.step(
        x, [point["best"] for point in points], where="post", color=COLOURS[-1], label="best so far", linewidth=1.2
    )
    for place, rung in enumerate(content["rungs"]):
        chosen = [index for index, point in enumerate(points) if point["round"] == rung]
        if chosen:
            marks: Any = {"marker": MARKERS[place % len(MARKERS)], "color": COLOURS[place % (len(COLOURS) - 1)]}
            scores = [points[index]["score"] for index in chosen]
            axes.plot(x[chosen], scores, linestyle="", label=f"after round {rung}", **marks)
    texts = [f"trial {point['trial']}, round {point['round']}: {point['score']:.4g}" for point in points]
    tips(axes, x, np.array([point["score"] for point in points]), texts)
