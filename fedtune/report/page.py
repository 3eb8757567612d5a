"""The report of one run: one HTML file that needs nothing else, and its figures as PNG."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedtune.report import tables
from fedtune.report.curves import (
    client_names,
    evaluations,
    kinds,
    loss_curve,
    paired_losses,
    stall_text,
    training_rounds,
)
from fedtune.report.device_times import planned_table, times_table
from fedtune.report.drawing import WITHOUT_PICTURES, can_draw, png, svg
from fedtune.report.headline import adapter_rank, headline
from fedtune.report.planner_choices import choices_table, devices_table, has_choices, idle
from fedtune.report.plots import PLOTS
from fedtune.report.reader import Run, Sample, Scores, finite, read_run
from fedtune.report.rendering import Card, Table, render, replace_text
from fedtune.report.units import bytes_text, number_text, seconds_text
from fedtune.rounds.record import ModuleRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTIONS: Mapping[str, tuple[str, str, Callable[[Run], Table | None]]] = {
    "loss-by-round": ("Loss by round", "The global model after each round; round 0 is the base.", tables.losses),
    "loss-by-bytes": ("Loss by traffic", "What a lower loss cost in bytes.", tables.losses),
    "loss-by-seconds": ("Loss by time", "What a lower loss cost in time.", tables.losses),
    "loss-by-clock": ("Loss by time on the devices", "A round lasts as long as its slowest client.", tables.losses),
    "choices": ("What each client was asked", "A dot per client and round, by kind of device.", choices_table),
    "device-times": (
        "Where the time of each kind of device went",
        "Mean over its clients and rounds; a round lasts as long as its slowest client.",
        times_table,
    ),
    "before-after": ("Before and after, per client", "Held-out rows, never trained on.", tables.before_after),
    "clients": (
        "Clients by rounds",
        "How much a client's loss fell in its round, on the same rows: on held-out ones where it holds out any.",
        tables.client_map,
    ),
    "traffic": ("Bytes up and down", "Measured, all clients together.", tables.traffic),
    "ranks": ("Rank of the global change", "Mean per kind of module; the band spans all of them.", tables.ranks),
    "spectrum": ("Singular values of the global change", "After the last round.", tables.spectrum),
}
"""Title, caption and numbers of each figure of `PLOTS`."""


@dataclass(frozen=True)
class Tile:
    """One key number; without a value it is left out."""

    title: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Uploads:
    """What the server received from clients, as far as the rounds recorded it."""

    updates: int
    sizes: str
    """Of one update, smallest to largest."""
    total: str
    modules: Mapping[str, ModuleRecord]
    kinds: Mapping[str, list[str]]
    scalars: bool
    """Clients sent scalars along seeds in place of factors."""
    descends: bool
    """Some of them sent a number for each direction."""
    assigned: bool
    pruned: bool


def write_report(run: Path, *, pictures: bool = True) -> Path:
    """Write report.html, and with pictures plots/*.png, into a run directory and return the page's path.

    Without matplotlib the page has the numbers of its figures in their place.

    Raises:
        StoreError: if the directory cannot be read.
    """
    content = read_run(run)
    drawn = PLOTS if can_draw() else {}
    figures = {name: figure for name, draw in drawn.items() if (figure := draw(content)) is not None}
    if pictures and drawn:
        write_pictures(run / "plots", figures)
    target = run / "report.html"
    replace_text(target, report_page(content, figures))
    return target


def write_pictures(folder: Path, figures: Mapping[str, Figure]) -> None:
    """Write each figure as PNG into a folder, and remove those of an earlier report."""
    folder.mkdir(exist_ok=True)
    for name in PLOTS:
        if name in figures:
            (folder / f"{name}.png").write_bytes(png(figures[name]))
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)


def report_page(run: Run, figures: Mapping[str, Figure]) -> str:
    """Return the whole page."""
    before, after = evaluations(run)
    return render(
        "report.html.j2",
        title=f"{run.name}: report",
        run=run,
        last=run.rounds[-1].round,
        headline=headline(run),
        loads=adapter_rank(run) > 0 and (run.path / "adapter").is_dir(),
        # Absolute paths are of this machine alone, and say how its folders are named.
        place=run.path.name if run.path.is_absolute() else run.path,
        facts=facts(run),
        tiles=tiles(run),
        cards={name: card(run, name, figure) for name, figure in figures.items()} if can_draw() else table_cards(run),
        without_pictures="" if can_draw() else WITHOUT_PICTURES,
        scores=tables.scores(run) if before != after or before.test else None,
        stalled=stall_text(run),
        totals=tables.clients(run),
        verbs=tables.verbs(run),
        own_models=tables.own_models(run),
        profiles=devices_table(run),
        idle=idle(run),
        planned=planned_table(run),
        samples=samples(run),
        failures=tables.failures_table(run),
        uploads=uploads(run),
        seeds=tables.seeds(run),
        provenance=tables.provenance(run),
    )


def samples(run: Run) -> Sequence[Sample]:
    """Return the prompts with their answers before and after."""
    if run.summary is None:
        return []
    return [*([run.summary.sample] if run.summary.sample else []), *run.summary.samples]


def card(run: Run, name: str, figure: Figure) -> Card:
    title, caption, numbers = CAPTIONS[name]
    return Card(name, title, caption, svg(figure, name=name, title=title), numbers(run))


def table_cards(run: Run) -> Mapping[str, Card]:
    """Return the numbers of the figures that would have some, each table once, for a page without pictures."""
    cards, shown = dict[str, Card](), set[Callable[[Run], Table | None]]()
    for name, (title, caption, numbers) in CAPTIONS.items():
        known = numbers not in shown and (numbers is not choices_table or has_choices(run))
        if known and (table := numbers(run)) is not None and table.rows:
            shown.add(numbers)
            cards[name] = Card(name, "Losses by round" if numbers is tables.losses else title, caption, "", table)
    return cards


def facts(run: Run) -> list[tuple[str, str]]:
    """Return what the page's head says of the run, as (term, text)."""
    versions = ", ".join(f"{name} {version}" for name, version in run.summary.versions.items()) if run.summary else ""
    return [
        ("method", run.method),
        ("seed", str(run.seed)),
        ("base", short_base(run.summary.base.name) if run.summary else ""),
        ("clients", str(len(client_names(run)))),
        ("rounds", str(run.rounds[-1].round)),
        ("state", run.state),
        ("ended", end_time(run.path)),
        ("versions", versions),
    ]


def short_base(name: str) -> str:
    """Return a base's name, of a path its last part: the recipe, further down the page, has the whole of it.

    >>> short_base("org/model"), short_base("/data/models/tiny.gguf")
    ('org/model', 'tiny.gguf')
    """
    return name if name.count("/") < 2 else Path(name).name


def end_time(path: Path) -> str:
    """Return when the summary of a run was written, or else its last round."""
    for name in ("summary.json", "rounds.jsonl"):
        if (path / name).exists():
            return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime((path / name).stat().st_mtime))
    return ""


def tiles(run: Run) -> list[Tile]:
    """Return the key numbers: losses, traffic, time, parameters, failures."""
    failures = len(tables.failures(run))
    return [
        *loss_tiles(run),
        *traffic_tiles(run),
        *([trainable] if (trainable := trainable_tile(run)) else []),
        Tile("failures", str(failures), "see below" if failures else "every update was used"),
    ]


def loss_tiles(run: Run) -> list[Tile]:
    before, after = evaluations(run)
    worst = after.worst.client if after.worst else ""
    pairs = paired_losses(run)
    better = sum(last < first for _, first, last in pairs)
    tenth = after.worst_tenth
    tenths = [] if tenth is None else [loss_tile("worst tenth", before.worst_tenth, tenth, f"{tenth.clients} clients")]
    improved = Tile("clients improved", f"{better} of {len(pairs)}", "held-out loss below the base's")
    return [
        loss_tile("test loss", before.test, after.test),
        loss_tile("mean of clients", before.mean, after.mean),
        # Both numbers are of the client that is worst at the end: another may have been worst before.
        loss_tile("worst client", before.held_out.get(worst, before.worst), after.worst, note=worst),
        *tenths,
        *([improved] if pairs else []),
    ]


def loss_tile(title: str, before: Scores | None, after: Scores | None, note: str = "") -> Tile:
    if before is None or after is None:
        return Tile(title, "")
    old, new = finite(before.loss), finite(after.loss)
    if not note and before.perplexity is not None and after.perplexity is not None:
        note = f"perplexity {number_text(before.perplexity, 3)} → {number_text(after.perplexity, 3)}"
    return Tile(title, f"{number_text(old)} → {number_text(new)}", note)


def traffic_tiles(run: Run) -> list[Tile]:
    rounds = training_rounds(run)
    up, down = sum(record.bytes_up for record in run.rounds), sum(record.bytes_down for record in run.rounds)
    participations = max(1, sum(len(record.clients) for record in rounds))
    seconds = run.summary.seconds if run.summary else float(loss_curve(run).seconds[-1])
    typical = float(np.median([record.seconds for record in rounds])) if rounds else None
    return [
        Tile("sent up", bytes_text(up), f"{bytes_text(up / participations)} per client and round"),
        Tile("sent down", bytes_text(down), f"{bytes_text(down / participations)} per client and round"),
        Tile("time", seconds_text(seconds), f"{seconds_text(typical)} a round (median)"),
    ]


def trainable_tile(run: Run) -> Tile | None:
    if run.summary is None or not run.summary.trainable or not run.summary.base.parameters:
        return None
    share = 100 * run.summary.trainable / run.summary.base.parameters
    note = f"{number_text(share, 2)} % of {number_text(run.summary.base.parameters)}"
    return Tile("trainable", number_text(run.summary.trainable), note)


def uploads(run: Run) -> Uploads | None:
    """Return what the server received from clients; None if no client was ever asked."""
    clients = [client for record in run.rounds for client in record.clients.values()]
    sizes = [client.bytes_up for client in clients if client.bytes_up]
    modules = next((record.modules for record in reversed(run.rounds) if record.modules), {})
    scalars = any("seeds_moved" in record.figures for record in run.rounds)
    if not (clients or modules or scalars):
        return None
    low, high = bytes_text(min(sizes, default=0)), bytes_text(max(sizes, default=0))
    return Uploads(
        updates=len(sizes),
        sizes=low if low == high else f"{low} to {high}",
        total=bytes_text(sum(sizes)),
        modules=modules,
        kinds=kinds(modules),
        scalars=scalars,
        descends=any(client.verb == "descend" for client in clients),
        assigned=bool(clients),
        pruned=any(client.ratio is not None for client in clients),
    )
