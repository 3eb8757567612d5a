"""What a planner chose for each kind of device over the rounds, and the share of time that devices were idle."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedtune.planning.floor import FREE_ROUNDS
from fedtune.pruning.ranking import PruningSettings
from fedtune.report.curves import Floats, natural, training_rounds
from fedtune.report.drawing import MUTED, label, line_style, new_figure, tips, whole_rounds, with_style
from fedtune.report.reader import Run
from fedtune.report.rendering import Table
from fedtune.report.units import number_text, seconds_text
from fedtune.rounds.record import ClientRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL_CLIENTS = "all clients"
MOST_KINDS = 8
"""Kinds of devices with a line of their own: more lines cannot be distinguished in one figure."""


def has_choices(run: Run) -> bool:
    """Return whether there are choices to show: pruned clients, or a planner that gives its reasons."""
    rows = [client for record in run.rounds for client in record.clients.values()]
    return any(client.ratio is not None or client.why for client in rows)


def classes(run: Run) -> Mapping[str, Sequence[str]]:
    """Return the clients by kind of device, one kind where devices are not known."""
    names = sorted({name for record in run.rounds for name in record.clients}, key=natural)
    known = run.summary.devices.clients if run.summary else {}
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(known.get(name, ALL_CLIENTS), []).append(name)
    # Where nearly every client is a kind of its own, a mean over a kind is no mean.
    return dict(sorted(kinds.items())) if len(kinds) <= MOST_KINDS else {ALL_CLIENTS: names}


def seconds(client: ClientRecord) -> float:
    """Return how long a client took on its device; NaN where that is not known."""
    if client.compute_s is None or client.transfer_s is None:
        return math.nan
    return client.compute_s + client.transfer_s + client.overhead_s


PARTS: Sequence[tuple[str, Callable[[ClientRecord], float | None]]] = (
    ("pruning ratio", lambda client: client.ratio),
    ("rank", lambda client: None if client.rank is None else float(client.rank)),
    ("blocks trained", lambda client: client.top),
    ("share of the steps", lambda client: client.share),
    ("left out backward", lambda client: client.back),
    ("rank sent down", lambda client: None if client.down_rank is None else float(client.down_rank)),
)
"""What a planner chooses for a client, by the title of its panel."""
SHARES = ("pruning ratio", "blocks trained", "share of the steps", "left out backward")
SPREAD = 0.6
"""Width over which the dots of one round are spread, so that equal choices can be counted."""


def chosen(run: Run) -> Mapping[str, Mapping[str, Sequence[tuple[int, str, float]]]]:
    """Return (round, client, value) of every choice by kind of device, by panel; panels without a choice are left out.

    A part has a panel if it was chosen and differs between clients or rounds; pruning ratios and ranks always have.
    """
    groups, rounds = classes(run), training_rounds(run)
    panels = {}
    for title, value in PARTS:
        drawn = {
            kind: [
                (record.round, name, number)
                for record in rounds
                for name in names
                if name in record.clients and (number := value(record.clients[name])) is not None
            ]
            for kind, names in groups.items()
        }
        values = {number for dots in drawn.values() for *_, number in dots}
        if len(values) > 1 or (values and title in ("pruning ratio", "rank")):
            panels[title] = drawn
    return panels


@with_style
def choices(run: Run) -> Figure | None:
    """Draw what was chosen over the rounds: a dot per client, in the colour of its kind of device."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    if not has_choices(run) or not (panels := chosen(run)):
        return None
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = new_figure(7.4, 0.6 + 2.4 * lines)
    grid = figure.subplots(lines, columns, squeeze=False).reshape(-1)
    for axes, (title, drawn) in zip(grid, panels.items(), strict=False):
        draw_dots(axes, drawn, share=title in SHARES)
        if title == "pruning ratio":
            draw_floor(axes, run)
        axes.set_title(title)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=title not in SHARES))
        if title in SHARES:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
        whole_rounds(axes)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    figure.legend(*grid[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def draw_dots(axes: Axes, drawn: Mapping[str, Sequence[tuple[int, str, float]]], *, share: bool) -> None:
    """Draw the choices of all clients, those of one round beside each other."""
    cohorts: dict[int, list[str]] = {}
    for dots in drawn.values():
        for round, name, _ in dots:
            cohorts.setdefault(round, []).append(name)
    place = {
        (round, name): SPREAD * ((index + 0.5) / len(names) - 0.5)
        for round, names in cohorts.items()
        for index, name in enumerate(names)
    }
    for index, (kind, dots) in enumerate(drawn.items()):
        if not dots:
            continue
        x = np.array([round + place[round, name] for round, name, _ in dots])
        y = np.array([value for *_, value in dots])
        style = line_style(index, len(dots))
        text = f"{label(kind)} ({len({name for _, name, _ in dots})})"
        size = 4.5 if len(dots) <= 200 else 3.0
        axes.plot(x, y, label=text, linestyle="", color=style["color"], marker=style["marker"], ms=size, alpha=0.75)
        tips(axes, x, y, [f"{name}, round {round}: {number_text(value, 3)}" for round, name, value in dots])
    if share:
        axes.set_ylim(-0.04, 1.04)
    else:
        axes.set_ylim(bottom=0)


def floor_line(run: Run) -> tuple[Floats, Floats] | None:
    """Return (rounds, smallest ratio) for clients that deploy the pruned model; None where nothing bounds a planner."""
    recipe = tomllib.loads(run.recipe)
    table, planner, count = recipe.get("pruning"), recipe.get("planner", {}), recipe.get("rounds", {}).get("count", 0)
    name = planner.get("name") if isinstance(planner, dict) else planner
    goal = planner.get("goal", "auto") if isinstance(planner, dict) else "auto"
    if table is None or name == "fixed" or not count:
        return None
    settings = PruningSettings(**{key: table[key] for key in ("target", "ramp", "floor") if key in table})
    if not settings.target or (goal == "whole" and settings.floor != "ramp"):
        return None
    rounds = np.arange(1, count + 1)
    if settings.floor == "ramp":
        return rounds.astype(float), np.array([settings.ratio(int(round), count) for round in rounds])
    return rounds.astype(float), np.where(rounds > FREE_ROUNDS * count, settings.target, 0.0)


def draw_floor(axes: Axes, run: Run) -> None:
    """Draw the smallest ratio that a planner may choose."""
    line = floor_line(run)
    if line is not None:
        axes.step(*line, where="mid", color=MUTED, linewidth=1.2, linestyle=(0, (4, 2)), label="floor", zorder=1)


def choices_table(run: Run) -> Table:
    """Return every choice with its reason; of the parts that no client differs in there are no columns."""
    parts = [(title, value) for title, value in PARTS if title in chosen(run)]
    rows = []
    for record in training_rounds(run):
        for name in sorted(record.clients, key=natural):
            client = record.clients[name]
            values = [value(client) for _, value in parts]
            rows.append(
                [
                    str(record.round),
                    name,
                    *("" if number is None else number_text(number, 3) for number in values),
                    "" if math.isnan(seconds(client)) else seconds_text(seconds(client)),
                    client.why or client.reason,
                ]
            )
    head = ["round", "client", *(title for title, _ in parts), "time on the device", "why"]
    return Table(head, rows, text_columns=2)


def idle(run: Run) -> float | None:
    """Return the share of the fleet's time that clients waited for the slowest of their round; None without times."""
    shares = []
    for record in training_rounds(run):
        times = [seconds(client) for client in record.clients.values()]
        known = [time for time in times if not math.isnan(time)]
        if known and max(known) > 0:
            shares.append(1 - float(np.mean(known)) / max(known))
    return float(np.mean(shares)) if shares else None


def devices_table(run: Run) -> Table | None:
    """Return every number of every device profile with its provenance; None where no devices are known."""
    if run.summary is None or not run.summary.devices.profiles:
        return None
    counts: dict[str, int] = {}
    for kind in run.summary.devices.clients.values():
        counts[kind] = counts.get(kind, 0) + 1
    rows = [
        [name, str(counts.get(name, 0)), field, part.value, part.provenance]
        for name, profile in run.summary.devices.profiles.items()
        for field, part in profile.items()
    ]
    return Table(["device", "clients", "what", "value", "from"], rows, text_columns=1)
