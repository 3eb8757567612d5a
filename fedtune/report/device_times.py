"""Where the time of each kind of device went: download, computation, upload, and the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fedtune.report.curves import training_rounds
from fedtune.report.drawing import COLOURS, PAPER, label, new_figure, tip, with_style
from fedtune.report.planner_choices import classes, seconds
from fedtune.report.reader import Run
from fedtune.report.rendering import Table
from fedtune.report.units import bytes_text, seconds_text, seconds_unit
from fedtune.rounds.record import ClientRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PARTS = ("down", "compute", "up", "transfer", "rest")
"""Parts of a client's round, in the order in which they pass; transfer is both ways where these are not known apart."""


def parts_of(client: ClientRecord) -> Mapping[str, float]:
    """Return the seconds of a client's round by part; none where they are not known."""
    if client.compute_s is None or client.transfer_s is None:
        return {}
    rest = {"compute": client.compute_s, "rest": client.overhead_s}
    if client.down_s is None:
        return {"transfer": client.transfer_s, **rest}
    return {"down": client.down_s, "up": client.transfer_s - client.down_s, **rest}


def mean_times(run: Run) -> Mapping[str, Mapping[str, float]]:
    """Return the mean seconds of each part by kind of device, over all rounds in which its clients took part."""
    means: dict[str, Mapping[str, float]] = {}
    for kind, names in classes(run).items():
        rounds = [
            parts
            for record in training_rounds(run)
            for name in names
            if name in record.clients and (parts := parts_of(record.clients[name]))
        ]
        if rounds:
            known = [part for part in PARTS if any(part in parts for parts in rounds)]
            means[kind] = {part: float(np.mean([parts.get(part, 0.0) for parts in rounds])) for part in known}
    return means


@with_style
def device_times(run: Run) -> Figure | None:
    """Draw the mean round of each kind of device as a bar of its parts; None without times."""
    means = mean_times(run)
    totals = [sum(parts.values()) for parts in means.values()]
    if not means or not max(totals):
        return None
    size, unit = seconds_unit(max(totals))
    figure = new_figure(7.4, 1.1 + 0.34 * len(means))
    axes = figure.subplots()
    axes.grid(visible=False, axis="y")
    left = np.zeros(len(means))
    for index, part in enumerate(PARTS):
        values = np.array([parts.get(part, 0.0) for parts in means.values()]) / size
        if not values.any():
            continue
        bars = axes.barh(
            np.arange(len(means)), values, 0.62, left=left, label=part, color=COLOURS[index], edgecolor=PAPER
        )
        for kind, bar, value in zip(means, bars, values, strict=True):
            tip(bar, f"{kind}, {part}: {seconds_text(float(value) * size)}")
        left += values
    axes.set_yticks(np.arange(len(means)), [label(kind) for kind in means])
    axes.set_ylim(len(means) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"mean time of a round ({unit})")
    figure.legend(loc="outside upper left", ncols=5)
    return figure


def times_table(run: Run) -> Table | None:
    """Return the same numbers as a table; None without times."""
    means = mean_times(run)
    if not means:
        return None
    known = [part for part in PARTS if any(part in parts for parts in means.values())]
    rows = [
        [
            kind,
            *(seconds_text(parts.get(part, math.nan)) for part in known),
            seconds_text(sum(parts.values())),
            f"{100 * (parts.get('transfer', 0.0) + parts.get('down', 0.0) + parts.get('up', 0.0)) / total:.0f} %"
            if (total := sum(parts.values()))
            else "",
        ]
        for kind, parts in means.items()
    ]
    return Table(["device", *known, "in all", "of it transfer"], rows)


def planned_table(run: Run) -> Table | None:
    """Return planned beside measured memory and time of each kind of device; None where nothing was planned.

    The ratio is measured over planned: the median over clients and rounds, and the largest.
    """
    rows = []
    for kind, names in classes(run).items():
        clients = [record.clients[name] for record in training_rounds(run) for name in names if name in record.clients]
        memory = [(c.planned_bytes, float(c.peak_bytes)) for c in clients if c.planned_bytes and c.peak_bytes]
        times = [(c.planned_s, seconds(c)) for c in clients if c.planned_s and not math.isnan(seconds(c))]
        for what, pairs, text in (("memory", memory, bytes_text), ("time", times, seconds_text)):
            if pairs:
                planned, measured = np.array(pairs).T
                ratios = measured / planned
                shown = [text(float(np.median(planned))), text(float(np.median(measured)))]
                rows.append([kind, what, *shown, f"{np.median(ratios):.2f}", f"{ratios.max():.2f}"])
    head = ["device", "what", "planned (median)", "measured (median)", "ratio (median)", "ratio (largest)"]
    return Table(head, rows, text_columns=2) if rows else None
