"""The map of clients by rounds: whose loss fell, and who failed, was refused or was absent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedtune.report.curves import (
    Floats,
    client_names,
    gains,
    training_rounds,
)
from fedtune.report.drawing import CELL_INK, CELL_PAPER, INK, PAPER, label, new_figure, tip, with_style
from fedtune.report.reader import Run, finite
from fedtune.rounds.record import ClientRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

UNKNOWN = "used, loss unknown"
MARKS = {"failed": "x", "refused": "o", "late": "^", "unfit": "s", UNKNOWN: "."}
"""Marker of an update that has no gain to colour its cell, by `state`: most were not used."""
NO_COLOUR = (0.0, 0.0, 0.0, 0.0)
"""Of a cell without an update: the ground of the page, light or dark."""
MOST_CELLS = 600
"""Cells of a map that get a text of their own; more would weigh more than the map."""


@with_style
def client_map(run: Run) -> Figure | None:
    """Draw clients by rounds: how much the loss on the same rows fell, and who failed, was refused or was absent."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    names, rounds = client_names(run), training_rounds(run)
    if not names or not rounds:
        return None
    table = gains(run, names)
    row_height = min(0.3, 9.0 / len(names))
    figure = new_figure(7.4, max(2.2, 1.5 + row_height * len(names)))
    axes = figure.subplots()
    axes.grid(visible=False)
    reach = float(np.nanmax(np.abs(table))) if not np.isnan(table).all() else 1.0
    worse = bool((table < 0).any())
    # Symmetric about zero only if a loss rose: otherwise half of the scale would not be used.
    colours = (
        colormaps["PuOr"].with_extremes(bad=NO_COLOUR) if worse else colormaps["PuBu"].with_extremes(bad=NO_COLOUR)
    )
    image = axes.imshow(
        np.ma.masked_invalid(table),
        aspect="auto",
        interpolation="none",
        cmap=colours,
        norm=Normalize(-reach if worse else 0.0, reach or 1.0),
    )
    figure.colorbar(image, ax=axes, label="fall of the loss on the same rows", pad=0.015, fraction=0.04)
    _map_marks(axes, run, names, row_height)
    _map_tips(axes, run, names, table)
    _map_numbers(axes, table, reach, worse=worse)
    axes.spines[:].set_visible(False)
    step = 1 if row_height >= 0.085 else math.ceil(0.085 / row_height)
    size = min(8.5, row_height * 72 * 0.82 * step)
    axes.set_yticks(range(0, len(names), step), [label(name) for name in names[::step]], fontsize=size)
    spacing = next(step for step in (1, 2, 5, 10, 20, 50, 100, len(rounds)) if len(rounds) / step <= 14)
    ticks = [column for column, record in enumerate(rounds) if record.round % spacing == 0 or column == 0]
    axes.set_xticks(ticks, [str(rounds[column].round) for column in ticks])
    axes.set_xlabel("round")
    axes.tick_params(length=0)
    marks = map_legend(run, worse=worse)
    figure.legend(handles=marks, loc="outside upper left", ncols=len(marks))
    return figure


def state(client: ClientRecord) -> str:
    """Return what became of a client's update, and of one that was used whether it came without its losses."""
    gain = finite(client.loss_before) - finite(client.loss_after)
    return UNKNOWN if client.status == "ok" and math.isnan(gain) else client.status


def map_legend(run: Run, *, worse: bool) -> list[Line2D]:
    from matplotlib.lines import Line2D

    rounds = training_rounds(run)
    marks = [
        *(
            Line2D([], [], color=INK, marker=marker, markerfacecolor="none", linestyle="", label=status)
            for status, marker in MARKS.items()
            if status in ("failed", "refused")
            or any(state(client) == status for record in rounds for client in record.clients.values())
        ),
        Line2D([], [], color="#b8c2c8", marker="s", markerfacecolor="none", linestyle="", label="absent (blank)"),
    ]
    if worse:
        marks.append(Line2D([], [], color=INK, marker="_", linestyle="", label="loss rose"))
    return marks


def _map_marks(axes: Axes, run: Run, names: Sequence[str], row_height: float) -> None:
    row = {name: index for index, name in enumerate(names)}
    size = float(np.clip((row_height * 72 * 0.5) ** 2, 3.0, 40.0))
    width = 1.0 if size > 10 else 0.6
    for status, marker in MARKS.items():
        cells = [
            (column, row[name])
            for column, record in enumerate(training_rounds(run))
            for name, client in record.clients.items()
            if state(client) == status
        ]
        if not cells and status in ("unfit", UNKNOWN):
            continue  # only a fleet of simulated devices has the one, only sites that keep their losses the other
        x, y = [column for column, _ in cells], [line for _, line in cells]
        faces, edges = (INK, None) if marker in "x." else ("none", INK)  # a cross has no face; its strokes are one
        axes.scatter(x, y, s=size, linewidths=width, marker=marker, facecolors=faces, edgecolors=edges)


def _map_tips(axes: Axes, run: Run, names: Sequence[str], table: Floats) -> None:
    """Have a page show client, round and gain of a cell, or why there is none."""
    from matplotlib.patches import Rectangle

    if table.size > MOST_CELLS:
        return
    for (row, column), gain in np.ndenumerate(table):
        record = training_rounds(run)[column]
        client = record.clients.get(names[row])
        what = "absent" if client is None else state(client) + (f": {client.reason}" if client.reason else "")
        text = f"gained {gain:.3g}" if not math.isnan(gain) else what
        # Not quite transparent: a cell without any colour has no ground that a pointer could rest on.
        cell = Rectangle((column - 0.5, row - 0.5), 1.0, 1.0, facecolor=PAPER, alpha=0.004)
        tip(cell, f"{names[row]}, round {record.round}: {text}")
        axes.add_patch(cell)


def _map_numbers(axes: Axes, table: Floats, reach: float, *, worse: bool) -> None:
    """Write the numbers into the cells where they fit; else a bar marks the cells whose loss rose."""
    rows, columns = table.shape
    if columns <= 14 and rows <= 30:
        for (row, column), value in np.ndenumerate(table):
            if not math.isnan(value):
                dark = abs(value) > (0.62 if worse else 0.6) * reach
                colour = CELL_PAPER if dark else CELL_INK
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    elif worse:
        at = np.argwhere(table < 0)
        axes.scatter(at[:, 1], at[:, 0], marker="_", s=6, color=INK, linewidths=0.7)
