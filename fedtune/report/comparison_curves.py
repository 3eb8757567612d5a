"""Losses of several recipes over rounds, traffic and time, averaged over their seeds: the figures of a comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedtune.report.curves import Floats, LossCurve, loss_curve
from fedtune.report.drawing import label, line_style, new_figure, with_style
from fedtune.report.plots import Against, axis_unit
from fedtune.report.reader import Run
from fedtune.report.rendering import Table
from fedtune.report.units import bytes_text, number_text, seconds_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CurveOverSeeds:
    """One recipe over the rounds that all its seeds measured; every array is (rounds,)."""

    name: str
    rounds: Floats
    bytes: Floats
    """Mean over seeds, as are `seconds` and `clock`."""
    seconds: Floats
    clock: Floats
    mean: Floats
    low: Floats
    high: Floats


def shared_loss(groups: Sequence[Sequence[Run]]) -> tuple[str, list[CurveOverSeeds]]:
    """Return the first loss that every run has measured, and each recipe's line of it."""
    choices: tuple[tuple[str, Callable[[LossCurve], Floats]], ...] = (
        ("global test loss", lambda curve: curve.test),
        ("clients' mean held-out loss", lambda curve: curve.mean),
        ("clients' loss after their steps", lambda curve: curve.training),
    )
    measured = [[loss_curve(run) for run in members] for members in groups]
    for title, read in choices:
        if all(not np.isnan(read(curve)).all() for curves in measured for curve in curves):
            lines = [
                over_seeds(members[0].name, curves, read) for members, curves in zip(groups, measured, strict=True)
            ]
            return title, [line for line in lines if len(line.rounds)]
    return "", []


def over_seeds(name: str, seeds: Sequence[LossCurve], read: Callable[[LossCurve], Floats]) -> CurveOverSeeds:
    measured = [set(curve.rounds[~np.isnan(read(curve))].tolist()) for curve in seeds]
    rounds = np.array(sorted(set.intersection(*measured)))
    at = [np.flatnonzero(np.isin(curve.rounds, rounds)) for curve in seeds]
    values = np.array([read(curve)[places] for curve, places in zip(seeds, at, strict=True)])  # (seeds, rounds)
    return CurveOverSeeds(
        name=name,
        rounds=rounds,
        bytes=np.mean([curve.bytes[places] for curve, places in zip(seeds, at, strict=True)], axis=0),
        seconds=np.mean([curve.seconds[places] for curve, places in zip(seeds, at, strict=True)], axis=0),
        clock=np.mean([curve.clock[places] for curve, places in zip(seeds, at, strict=True)], axis=0),
        mean=values.mean(axis=0),
        low=values.min(axis=0),
        high=values.max(axis=0),
    )


def deployed_loss(groups: Sequence[Sequence[Run]]) -> tuple[str, list[CurveOverSeeds]]:
    """Return each recipe's line of the deployed model's loss; none if a run has not measured it."""
    measured = [[loss_curve(run) for run in members] for members in groups]
    if any(np.isnan(curve.deployed).all() for curves in measured for curve in curves):
        return "", []
    lines = [
        over_seeds(members[0].name, curves, lambda curve: curve.deployed)
        for members, curves in zip(groups, measured, strict=True)
    ]
    return "deployed model's test loss", [line for line in lines if len(line.rounds)]


@with_style
def curves(title: str, lines: Sequence[CurveOverSeeds], unit: str = "nats per token") -> Figure:
    """Draw each recipe's loss by round, by bytes and by time: the devices' where all have it."""
    legend_rows = -(-len(lines) // 3)
    figure = new_figure(9.6, 3.1 + 0.2 * legend_rows)
    panels = figure.subplots(1, 3, sharey=True)
    timed = all(line.clock.any() for line in lines)
    horizontal: tuple[Against, ...] = ("rounds", "bytes", "clock" if timed else "seconds")
    for axes, against in zip(panels, horizontal, strict=True):
        _draw(axes, lines, against)
    panels[0].set_ylabel(f"{title} ({unit})")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def _draw(axes: Axes, lines: Sequence[CurveOverSeeds], against: Against) -> None:
    reach = max(float(getattr(line, against).max()) for line in lines)
    size = axis_unit(axes, reach, against)
    for index, line in enumerate(lines):
        style = line_style(index, len(line.rounds))
        x = getattr(line, against) / size
        axes.fill_between(x, line.low, line.high, color=style["color"], alpha=0.16, linewidth=0)
        axes.plot(x, line.mean, label=label(line.name, 34), **style)


def numbers(title: str, lines: Sequence[CurveOverSeeds]) -> Table:
    timed = any(line.clock.any() for line in lines)
    rows = [
        [
            line.name,
            str(int(line.rounds[index])),
            *(number_text(float(values[index])) for values in (line.mean, line.low, line.high)),
            bytes_text(float(line.bytes[index])),
            seconds_text(float(line.seconds[index])),
            *([seconds_text(float(line.clock[index]))] if timed else []),
        ]
        for line in lines
        for index in range(len(line.rounds))
    ]
    head = ["recipe", "round", f"{title}, mean", "lowest seed", "highest seed", "traffic", "time here"]
    return Table([*head, *(["time on the devices"] if timed else [])], rows)
