"""The figures of a run's report; each returns None where the run has nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from fedtune.report.client_map import client_map
from fedtune.report.curves import (
    Floats,
    kinds,
    loss_curve,
    loss_unit,
    paired_losses,
    training_rounds,
)
from fedtune.report.device_times import device_times
from fedtune.report.drawing import (
    COLOURS,
    FAINT,
    INK,
    MUTED,
    PAPER,
    label,
    line_style,
    new_figure,
    tip,
    tips,
    whole_rounds,
    with_style,
)
from fedtune.report.planner_choices import choices
from fedtune.report.reader import Run, finite
from fedtune.report.units import bytes_text, bytes_unit, number_text, seconds_unit

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Against: TypeAlias = Literal["rounds", "bytes", "seconds", "clock"]


@with_style
def loss(run: Run, against: Against) -> Figure | None:
    """Draw the test loss, the clients' mean held-out loss and the band between best and worst client."""
    curve = loss_curve(run)
    if against == "clock" and not curve.clock.any():
        return None
    if all(np.isnan(values).all() for values in (curve.test, curve.mean, curve.training)):
        return None
    figure = new_figure(5.8, 3.4)
    axes = figure.subplots()
    along: Floats = getattr(curve, against)
    x = along / axis_unit(axes, float(along.max()), against)
    every = max(1, len(x) // 14)
    band = ~np.isnan(curve.best)
    if band.any():
        axes.fill_between(
            x[band],
            curve.best[band],
            curve.worst[band],
            color=COLOURS[0],
            alpha=0.13,
            linewidth=0,
            label="best to worst client",
        )
        for edge in (curve.best, curve.worst):
            axes.plot(x[band], edge[band], color=COLOURS[0], alpha=0.55, linewidth=0.7)
    names = [f"round {number:.0f}" for number in curve.rounds]
    for text, values in (("mean of clients", curve.mean), ("test", curve.test), ("deployed", curve.deployed)):
        known = np.flatnonzero(~np.isnan(values))
        tips(axes, x[known], values[known], [f"{text}, {names[i]}: {number_text(float(values[i]))}" for i in known])
    _line(axes, x, curve.mean, "mean of clients, held out", color=COLOURS[0], marker="o", markevery=every)
    _line(axes, x, curve.test, "global test", color=COLOURS[1], marker="s", linestyle=(0, (5, 2)), markevery=every)
    _line(axes, x, curve.deployed, "test, as deployed", color=COLOURS[3], marker="D", markersize=3.5, markevery=every)
    _line(
        axes,
        x,
        curve.training,
        "clients after their steps",
        color=MUTED,
        linestyle=(0, (1, 1.6)),
        linewidth=1.3,
        marker=".",
        markevery=every,
    )
    axes.set_ylabel(f"loss ({loss_unit([run])})")
    axes.margins(x=0.02)
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def axis_unit(axes: Axes, reach: float, against: Against) -> float:
    """Label the horizontal axis with a unit that fits up to `reach` and return the unit's size."""
    if against == "rounds":
        whole_rounds(axes)
        return 1.0
    size, unit = bytes_unit(reach) if against == "bytes" else seconds_unit(reach)
    names = {"bytes": "traffic, all clients", "seconds": "time", "clock": "time on the devices"}
    axes.set_xlabel(f"{names[against]} ({unit})")
    return size


def _line(axes: Axes, x: Floats, y: Floats, text: str, **style: object) -> None:
    known = ~np.isnan(y)
    if known.any():
        axes.plot(x[known], y[known], label=text, **style)  # type: ignore[arg-type]


@with_style
def traffic(run: Run) -> Figure | None:
    """Draw bytes up (above the axis) and down (below it) per round, and both summed from the start."""
    from matplotlib.ticker import FuncFormatter

    rounds = training_rounds(run)
    up = np.array([float(record.bytes_up) for record in rounds])
    down = np.array([float(record.bytes_down) for record in rounds])
    if not rounds or up.sum() + down.sum() == 0:
        return None
    number = np.array([record.round for record in rounds], dtype=np.float64)
    figure = new_figure(7.4, 3.0)
    single, total = figure.subplots(1, 2)
    size, unit = bytes_unit(float(max(up.max(), down.max())))
    width = 0.78 if len(rounds) <= 60 else 1.0
    fine: dict[str, Any] = {"edgecolor": PAPER, "linewidth": 0.0 if len(rounds) > 60 else 0.5}
    hatch = "////" if len(rounds) <= 60 else None
    ups = single.bar(number, up / size, width, color=COLOURS[1], label="up: clients to server", **fine)
    fine |= {"hatch": hatch, "label": "down: server to clients"}
    downs = single.bar(number, -down / size, width, color=COLOURS[5], **fine)
    for way, bars, sizes in (("up", ups, up), ("down", downs, down)):
        for record, bar, sent in zip(rounds, bars, sizes, strict=True):
            tip(bar, f"round {record.round}: {bytes_text(float(sent))} {way}")
    single.axhline(0, color=INK, linewidth=0.8)
    single.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{abs(value):g}"))
    single.set(title="per round", ylabel=f"{unit}, down below, up above")
    size, unit = bytes_unit(float(max(up.sum(), down.sum())))
    every = max(1, len(rounds) // 10)
    total.plot(number, np.cumsum(up) / size, color=COLOURS[1], marker="^", markevery=every)
    total.plot(number, np.cumsum(down) / size, color=COLOURS[5], marker="v", markevery=every, linestyle=(0, (5, 2)))
    total.set(title="summed", ylabel=unit)
    total.set_ylim(bottom=0)
    for axes in (single, total):
        whole_rounds(axes)
    figure.legend(*single.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


@with_style
def ranks(run: Run) -> Figure | None:
    """Draw the rank of the global change and the share of its energy left after cuts, per kind of module."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    rounds = [record for record in run.rounds if record.modules]
    if not rounds:
        return None
    groups = kinds(name for record in rounds for name in record.modules)
    number = np.array([record.round for record in rounds], dtype=np.float64)
    figure = new_figure(7.4, 3.1)
    left, right = figure.subplots(1, 2)
    left.set_title("rank of the global change")
    right.set_title("energy kept")
    rank = [{name: float(module.rank) for name, module in record.modules.items()} for record in rounds]
    energy = [{name: finite(module.reaches_clients) for name, module in record.modules.items()} for record in rounds]
    _group_bands(left, number, groups, rank)
    if not _group_bands(right, number, groups, energy):
        right.text(0.5, 0.5, "nothing was cut", ha="center", va="center", transform=right.transAxes, color=MUTED)
    for axes in (left, right):
        whole_rounds(axes)
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_ylim(bottom=0)
    right.set_ylim(max(0.0, right.get_ylim()[0]), 1.0)
    right.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.5g} %"))
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def _group_bands(
    axes: Axes, number: Floats, groups: Mapping[str, list[str]], values: Sequence[Mapping[str, float]]
) -> bool:
    drawn = False
    for index, (kind, names) in enumerate(groups.items()):
        table = np.array([[row.get(name, math.nan) for name in names] for row in values])  # (rounds, modules)
        known = ~np.isnan(table).all(axis=1)
        if not known.any():
            continue
        drawn = True
        x, table = number[known], table[known]
        axes.plot(x, np.nanmean(table, axis=1), label=f"{label(kind)} ({len(names)})", **line_style(index, len(x)))
        axes.fill_between(
            x,
            np.nanmin(table, axis=1),
            np.nanmax(table, axis=1),
            color=COLOURS[index % len(COLOURS)],
            alpha=0.13,
            linewidth=0,
        )
    return drawn


@with_style
def spectrum(run: Run) -> Figure | None:
    """Draw the singular values of the last round's global change, one panel per kind, one line per module."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    record = next((record for record in reversed(run.rounds) if record.modules), None)
    values = {name: np.array(module.singular_values) for name, module in record.modules.items()} if record else {}
    values = {name: line[line > 0] for name, line in values.items() if (line > 0).any()}
    if not values:
        return None
    groups = kinds(values)
    columns = min(4, len(groups))
    lines = math.ceil(len(groups) / columns)
    figure = new_figure(7.4 if columns > 1 else 5.0, 0.7 + 2.3 * lines)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    shades = colormaps["viridis"]
    for axes, (kind, names) in zip(panels.flat, groups.items(), strict=False):
        for depth, name in enumerate(names):
            y = values[name]
            share = depth / max(1, len(names) - 1)
            ends = depth in (0, len(names) - 1)
            axes.semilogy(
                np.arange(1, len(y) + 1),
                y,
                color=shades(0.3 + 0.45 * share),
                linewidth=1.6 if ends else 0.8,
                marker=("o" if depth == 0 else "s") if ends else None,
                markersize=3.5,
                markevery=max(1, len(y) // 8),
                label=label(names[depth].rsplit(".", 1)[0], 26) if ends else None,
            )
        axes.yaxis.set_major_locator(LogLocator(numticks=7, subs=(1.0,) if _decades(values) > 1.5 else (1.0, 2.0, 5.0)))
        axes.set_title(f"{label(kind)} ({len(names)})")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    for axes in list(panels.flat)[len(groups) :]:
        axes.set_visible(False)
    panels[0, 0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panels[0, 0].yaxis.set_minor_formatter(NullFormatter())
    figure.supxlabel("index", fontsize=9)
    figure.supylabel("singular value", fontsize=9)
    ends_only = [
        Line2D([], [], color=shades(0.3), marker="o", markersize=3.5, label="first module"),
        Line2D([], [], color=shades(0.75), marker="s", markersize=3.5, label="last module"),
        Line2D([], [], color=shades(0.52), linewidth=0.8, label="between"),
    ]
    figure.legend(handles=ends_only, loc="outside upper left", ncols=3)
    return figure


def _decades(values: Mapping[str, Floats]) -> float:
    return math.log10(max(line.max() for line in values.values()) / min(line.min() for line in values.values()))


@with_style
def before_after(run: Run) -> Figure | None:
    """Draw each client's held-out loss of the base and of the tuned model, highest loss after on top."""
    pairs = paired_losses(run)
    if not pairs:
        return None
    row_height = min(0.28, 9.5 / len(pairs))
    figure = new_figure(5.8, 1.15 + row_height * len(pairs))
    axes = figure.subplots()
    axes.grid(visible=False, axis="y")
    rows = np.arange(len(pairs))
    before = np.array([pair[1] for pair in pairs])
    after = np.array([pair[2] for pair in pairs])
    size = float(np.clip((row_height * 72 * 0.42) ** 2, 8.0, 42.0))
    better = after <= before
    axes.hlines(rows[better], after[better], before[better], color=FAINT, linewidth=1.6, zorder=1)
    axes.scatter(before, rows, s=size, facecolors=PAPER, edgecolors=MUTED, linewidths=1.2, label="base", zorder=2)
    axes.scatter(after[better], rows[better], s=size, color=COLOURS[0], label="tuned", zorder=3)
    if not better.all():
        axes.hlines(
            rows[~better],
            before[~better],
            after[~better],
            color=COLOURS[1],
            linewidth=1.6,
            linestyle=(0, (2, 1.5)),
            zorder=1,
        )
        axes.scatter(
            after[~better],
            rows[~better],
            s=size,
            marker="X",
            color=COLOURS[1],
            label="tuned, worse than the base",
            zorder=3,
        )
    texts = [f"{name}: {number_text(old)} to {number_text(new)}" for name, old, new in pairs]
    for losses in (before, after):
        tips(axes, losses, rows, texts)
    step = 1 if row_height >= 0.075 else math.ceil(0.075 / row_height)
    axes.set_yticks(
        rows[::step], [label(name) for name, *_ in pairs[::step]], fontsize=min(8.5, row_height * step * 72 * 0.82)
    )
    axes.set_ylim(len(pairs) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"held-out loss ({loss_unit([run])})")
    figure.legend(loc="outside upper left", ncols=3)
    return figure


PLOTS: Mapping[str, Callable[[Run], Figure | None]] = {
    "loss-by-round": lambda run: loss(run, "rounds"),
    "loss-by-bytes": lambda run: loss(run, "bytes"),
    "loss-by-seconds": lambda run: loss(run, "seconds"),
    "loss-by-clock": lambda run: loss(run, "clock"),
    "choices": choices,
    "device-times": device_times,
    "before-after": before_after,
    "clients": client_map,
    "traffic": traffic,
    "ranks": ranks,
    "spectrum": spectrum,
}
"""File name of each figure, in the order of the page."""
