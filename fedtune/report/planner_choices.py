"""What a planner chose for each kind of device over the rounds, and the share of time that devices were idle."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedtune.report.curves import Floats, natural, training_rounds
from fedtune.report.drawing import label, line_style, new_figure, styled, whole_rounds
from fedtune.report.reader import Run
from fedtune.report.rendering import Table
from fedtune.report.units import number_text, seconds_text, seconds_unit
from fedtune.rounds.record import ClientRecord, RoundRecord

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


def mean_by_round(
    rounds: Sequence[RoundRecord], names: Sequence[str], value: Callable[[ClientRecord], float | None]
) -> Floats:
    """Return the mean over a kind's clients of each round, (rounds,); NaN where none of them took part."""
    means = []
    for record in rounds:
        values = [value(record.clients[name]) for name in names if name in record.clients]
        known = [number for number in values if number is not None and not math.isnan(number)]
        means.append(float(np.mean(known)) if known else math.nan)
    return np.array(means)


@styled
def choices(run: Run) -> Figure | None:
    """Draw pruning ratio, rank and seconds over the rounds, the mean of each kind of device."""
    rounds = training_rounds(run)
    if not rounds or not has_choices(run):
        return None
    number = np.array([record.round for record in rounds], dtype=np.float64)
    parts: list[tuple[str, Callable[[ClientRecord], float | None]]] = [
        ("pruning ratio", lambda client: client.ratio if client.ratio is not None else math.nan),
        ("rank", lambda client: None if client.rank is None else float(client.rank)),
        ("seconds on the device", seconds),
    ]
    groups = classes(run)
    drawn = {
        title: {kind: mean_by_round(rounds, names, value) for kind, names in groups.items()} for title, value in parts
    }
    drawn = {title: lines for title, lines in drawn.items() if not all(np.isnan(y).all() for y in lines.values())}
    figure = new_figure(7.4, 3.0)
    panels = figure.subplots(1, len(drawn), squeeze=False)[0]
    for axes, (title, lines) in zip(panels, drawn.items(), strict=True):
        size, unit = 1.0, ""
        if title.startswith("seconds"):
            size, unit = seconds_unit(float(np.nanmax([np.nanmax(y) for y in lines.values() if not np.isnan(y).all()])))
        for index, (kind, y) in enumerate(lines.items()):
            known = ~np.isnan(y)
            if known.any():
                style = line_style(index, int(known.sum()))
                axes.plot(number[known], y[known] / size, label=f"{label(kind)} ({len(groups[kind])})", **style)
        axes.set_title(f"time on the device ({unit})" if unit else title)
        axes.set_ylim(bottom=0)
        if title == "pruning ratio":
            axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.3g} %"))
        if title == "rank":
            axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        whole_rounds(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=4)
    return figure


def choices_table(run: Run) -> Table:
    """Return every choice with its reason."""
    rows = []
    for record in training_rounds(run):
        for name in sorted(record.clients, key=natural):
            client = record.clients[name]
            rows.append(
                [
                    str(record.round),
                    name,
                    number_text(client.ratio, 3) if client.ratio is not None else "",
                    "" if client.rank is None else str(client.rank),
                    "" if math.isnan(seconds(client)) else seconds_text(seconds(client)),
                    client.why or client.reason,
                ]
            )
    return Table(["round", "client", "ratio", "rank", "time on the device", "why"], rows, text_columns=2)


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
