"""Runs side by side: one row per recipe with mean and spread over its seeds, and the page that shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from fedtune.errors import ConfigError, Fault
from fedtune.report.comparison_curves import curves, deployed_loss, numbers, shared_loss
from fedtune.report.curves import Floats, LossCurve, evaluations, last, loss_curve, loss_unit
from fedtune.report.differences import differences, settings_table, warnings
from fedtune.report.drawing import can_draw, png, svg
from fedtune.report.planner_choices import idle
from fedtune.report.protocol_tables import percent, protocol_tables, ratio_text, short, spread_text
from fedtune.report.protocols import Protocols, ProtocolSettings, protocols
from fedtune.report.reader import Run, Scores, finite, read_run
from fedtune.report.rendering import Card, Table, render, replace_text
from fedtune.report.spread import Spread, mean_and_spread
from fedtune.report.time_to_target import times_to_target
from fedtune.report.units import NOTHING, bytes_text, number_text, seconds_text
from fedtune.store.typed_json import nan_to_null


@dataclass(frozen=True)
class Row:
    """One recipe: all its seeds."""

    name: str
    method: str
    seeds: tuple[int, ...]
    rounds: int
    """Of the seed with the fewest."""
    finished: bool
    test_before: Spread
    test_after: Spread
    mean_client: Spread
    """Mean of the clients' held-out losses, after."""
    worst_client: Spread
    """Highest of the clients' held-out losses, after."""
    bytes_up: Spread
    bytes_down: Spread
    seconds: Spread
    deployed: Spread
    """Last test loss of the model as it is deployed, where that is a smaller one."""
    clock: Spread
    """Seconds on the devices, simulated or measured."""
    idle: Spread
    """Share of those in which clients waited for the slowest of their round."""


@dataclass(frozen=True)
class Comparison:
    rows: tuple[Row, ...]
    """In the order in which the recipes were first given."""
    groups: tuple[tuple[Run, ...], ...]
    """The runs of each row, in order of seed."""


def compare(runs: Sequence[Path]) -> Comparison:
    """Read the run directories and group those that share name and method.

    Raises:
        StoreError: if one cannot be read.
        ConfigError: if none is given, or a recipe's seed is there twice.
    """
    if not runs:
        raise ConfigError(Fault("", "at least one run directory", "none", "name one or more"))
    groups: dict[tuple[str, str], list[Run]] = {}
    for path in runs:
        run = read_run(path)
        groups.setdefault((run.name, run.method), []).append(run)
    for (name, _), members in groups.items():
        seeds = sorted(run.seed for run in members)
        # A seed that counts twice would narrow the spread without a second experiment.
        twice = next((seed for seed, following in pairwise(seeds) if seed == following), None)
        if twice is not None:
            raise ConfigError(
                Fault(name, "each seed once", f"seed {twice} twice", "leave one of the runs out or rename it")
            )
    ordered = tuple(tuple(sorted(members, key=lambda run: run.seed)) for members in groups.values())
    return Comparison(rows=tuple(_row(members) for members in ordered), groups=ordered)


def _row(runs: Sequence[Run]) -> Row:
    def over(read: Callable[[Run], float]) -> Spread:
        return mean_and_spread([read(run) for run in runs])

    def loss(scores: Scores | None) -> float:
        return finite(scores.loss) if scores else math.nan

    return Row(
        name=runs[0].name,
        method=runs[0].method,
        seeds=tuple(run.seed for run in runs),
        rounds=min(run.rounds[-1].round for run in runs),
        finished=all(run.state == "finished" for run in runs),
        test_before=over(lambda run: loss(evaluations(run)[0].test)),
        test_after=over(lambda run: loss(evaluations(run)[1].test)),
        mean_client=over(lambda run: loss(evaluations(run)[1].mean)),
        worst_client=over(lambda run: loss(evaluations(run)[1].worst)),
        bytes_up=over(lambda run: float(sum(record.bytes_up for record in run.rounds))),
        bytes_down=over(lambda run: float(sum(record.bytes_down for record in run.rounds))),
        seconds=over(lambda run: run.summary.seconds if run.summary else sum(record.seconds for record in run.rounds)),
        deployed=over(lambda run: last(loss_curve(run).deployed)),
        clock=over(lambda run: run.rounds[-1].clock_s or math.nan),
        idle=over(lambda run: math.nan if (share := idle(run)) is None else share),
    )


def write_comparison(runs: Sequence[Path], out: Path, settings: ProtocolSettings | None = None) -> Path:
    """Write comparison.html, comparison.json and figures as PNG into the folder `out` and return the page's path.

    Args:
        runs: run directories.
        out: where the page is written.
        settings: budgets, target and measure of the three protocols.

    Raises:
        StoreError, ConfigError: as `compare` does.
    """
    comparison = compare(runs)
    out.mkdir(parents=True, exist_ok=True)
    three = protocols(comparison.groups, settings)
    replace_text(out / "comparison.json", json.dumps(nan_to_null(numbers_of(comparison, three)), indent=1) + "\n")
    cards, unit = [], loss_unit(run for members in comparison.groups for run in members)
    for name, (title, lines) in {
        "comparison": shared_loss(comparison.groups),
        "deployed": deployed_loss(comparison.groups),
    }.items():
        if lines:
            heading = f"{title[0].upper()}{title[1:]} by round, traffic and time"
            drawing = ""
            if can_draw():
                figure = curves(title, lines, unit)
                (out / f"{name}.png").write_bytes(png(figure))
                drawing = svg(figure, name=name, title=heading)
            caption = "One line per recipe; the band spans its seeds."
            cards.append(Card(name, heading, caption, drawing, numbers(title, lines)))
    target = out / "comparison.html"
    text = render(
        "comparison.html.j2",
        title="fedtune comparison",
        heading=_heading(comparison),
        results=comparison_table(comparison),
        loss_unit=unit,
        differences=difference_table(comparison),
        settings=differing_settings(comparison),
        protocols=protocol_tables([row.name for row in comparison.rows], three),
        protocol_clock=three.clock,
        warnings=[*warnings(comparison.groups), *three.notes],
        times=time_table(comparison),
        cards=cards,
        recipes=[members[0] for members in comparison.groups],
    )
    replace_text(target, text)
    return target


def numbers_of(comparison: Comparison, three: Protocols) -> Mapping[str, Any]:
    """Return the content of comparison.json: what the page's tables hold, for programs and for the terminal."""
    return {
        "version": 1,
        "recipes": [
            {**asdict(row), "bytes": asdict(traffic(members))}
            for row, members in zip(comparison.rows, comparison.groups, strict=True)
        ],
        "differences": [asdict(difference) for difference in differences(comparison.groups)],
        "settings": settings_table(comparison.groups),
        "protocols": asdict(three),
        "warnings": [*warnings(comparison.groups), *three.notes],
    }


def traffic(runs: Sequence[Run]) -> Spread:
    """Return the bytes up and down of a recipe's runs."""
    return mean_and_spread([float(sum(record.bytes_up + record.bytes_down for record in run.rounds)) for run in runs])


def difference_table(comparison: Comparison) -> Table | None:
    """Return how far each recipe's loss is above the first one's."""
    rows = [
        [
            difference.recipe,
            difference.measure,
            f"{difference.interval.mean:+.4f}",
            NOTHING
            if math.isnan(difference.interval.low)
            else f"{difference.interval.low:+.4f} to {difference.interval.high:+.4f}",
            f"{difference.interval.pairs}, by {difference.paired_by}",
        ]
        for difference in differences(comparison.groups)
    ]
    head = ["recipe", "of the", f"difference to {comparison.rows[0].name}", "95 % interval", "pairs"]
    return Table(head, rows, text_columns=2) if rows else None


def differing_settings(comparison: Comparison) -> Table | None:
    """Return the settings that are not the same in all recipes."""
    rows = [[key, *values] for key, values in settings_table(comparison.groups).items()]
    head = ["setting", *(row.name for row in comparison.rows)]
    return Table(head, rows, text_columns=len(head)) if rows else None


def _heading(comparison: Comparison) -> str:
    recipes, runs = len(comparison.rows), sum(map(len, comparison.groups))
    return f"{recipes} recipe{'' if recipes == 1 else 's'}, {runs} run{'' if runs == 1 else 's'}"


def comparison_table(comparison: Comparison) -> Table:
    """Return the rows as the page shows them."""
    head = [
        "recipe",
        "method",
        "seeds",
        "rounds",
        "test, base",
        "test, tuned",
        "mean client",
        "worst client",
        "up",
        "down",
        "time here",
    ]
    rows = [
        [
            row.name,
            row.method,
            ", ".join(map(str, row.seeds)),
            f"{row.rounds}{'' if row.finished else ' (interrupted)'}",
            *(
                spread_text(loss, number_text, short)
                for loss in (row.test_before, row.test_after, row.mean_client, row.worst_client)
            ),
            *(spread_text(size, bytes_text, bytes_text) for size in (row.bytes_up, row.bytes_down)),
            spread_text(row.seconds, seconds_text, seconds_text),
        ]
        for row in comparison.rows
    ]
    return Table(head, rows, text_columns=3)


def time_table(comparison: Comparison) -> Table | None:
    """Return each recipe's time on the devices, in all and to the common targets; None if a recipe has no clock."""
    if any(math.isnan(row.clock.mean) for row in comparison.rows):
        return None
    kinds: tuple[tuple[str, Callable[[LossCurve], Floats]], ...] = (
        ("test loss", lambda curve: curve.test),
        ("deployed loss", lambda curve: curve.deployed),
    )
    measured = {kind: times_to_target(comparison.groups, read) for kind, read in kinds}
    shown = {kind: times for kind, (targets, times) in measured.items() if targets}
    with_deployed = any(not math.isnan(row.deployed.mean) for row in comparison.rows)
    head = ["recipe", "whole run", "idle", *(["deployed, tuned"] if with_deployed else [])]
    for kind in shown:
        low, high = min(measured[kind][0].values()), max(measured[kind][0].values())
        target = number_text(low) if low == high else f"{number_text(low)} to {number_text(high)}"
        head += [f"until {kind} {target}", f"of {comparison.rows[0].name}"]
    rows = []
    for index, row in enumerate(comparison.rows):
        cells = [
            row.name,
            spread_text(row.clock, seconds_text, seconds_text),
            spread_text(row.idle, percent, percent),
            *([spread_text(row.deployed, number_text, short)] if with_deployed else []),
        ]
        for times in shown.values():
            cells += [
                spread_text(mean_and_spread(times[index].seconds), seconds_text, seconds_text),
                ratio_text(times[index].ratio),
            ]
        rows.append(cells)
    return Table(head, rows)
