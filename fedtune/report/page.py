"""The report of one run: one HTML file that needs nothing else, and its figures as PNG."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from html import escape
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fedtune.report import tables
from fedtune.report.curves import client_names, kinds, loss_curve, paired_losses, standings, training_rounds
from fedtune.report.drawing import png, svg
from fedtune.report.planner_choices import choices_table, devices_table, idle
from fedtune.report.plots import PLOTS
from fedtune.report.reader import Run, Scores, finite, read_run
from fedtune.report.style import page
from fedtune.report.units import NOTHING, bytes_text, number_text, seconds_text

CAPTIONS: Mapping[str, tuple[str, str, Callable[[Run], str]]] = {
    "loss-by-round": ("Loss by round", "The global model after each round; round 0 is the base.", tables.losses),
    "loss-by-bytes": ("Loss by traffic", "What a lower loss cost in bytes.", tables.losses),
    "loss-by-seconds": ("Loss by time", "What a lower loss cost in time.", tables.losses),
    "loss-by-clock": ("Loss by time on the devices", "A round lasts as long as its slowest client.", tables.losses),
    "choices": ("What each kind of device was asked", "Mean over its clients of a round.", choices_table),
    "before-after": ("Before and after, per client", "Held-out rows, never trained on.", tables.before_after),
    "clients": ("Clients by rounds", "How much a client's training loss fell in its round.", tables.client_map),
    "traffic": ("Bytes up and down", "Measured, all clients together.", tables.traffic),
    "ranks": ("Rank of the global change", "Mean per kind of module; the band spans all of them.", tables.ranks),
    "spectrum": ("Singular values of the global change", "After the last round.", tables.spectrum),
}
"""Title, caption and numbers of each figure of `PLOTS`."""


def write_report(run: Path) -> Path:
    """Write report.html and plots/*.png into a run directory and return the page's path.

    Raises: StoreError if the directory cannot be read.
    """
    record = read_run(run)
    figures = {name: figure for name, draw in PLOTS.items() if (figure := draw(record)) is not None}
    folder = run / "plots"
    folder.mkdir(exist_ok=True)
    for name in PLOTS:
        if name in figures:
            (folder / f"{name}.png").write_bytes(png(figures[name]))
        else:
            (folder / f"{name}.png").unlink(missing_ok=True)
    target = run / "report.html"
    replace_text(target, render(record, figures))
    return target


def replace_text(target: Path, text: str) -> None:
    """Write the file beside its place and move it there, so that a reader never sees half of it."""
    part = target.with_name(target.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)


def render(run: Run, figures: Mapping[str, Figure]) -> str:
    """Return the whole page."""
    sections = (
        _header(run),
        _key_numbers(run),
        _section(
            "Learning", _figures(run, figures, "loss-by-round", "loss-by-bytes", "loss-by-seconds") + _scores(run)
        ),
        _section(
            "Clients",
            _figures(run, figures, "before-after", "clients") + _details("Totals per client", tables.clients(run)),
        ),
        _section("Devices", _figures(run, figures, "choices", "loss-by-clock") + _devices(run)),
        _section("A sample", _sample(run)),
        _section("Failures", _failures(run)),
        _section("What leaves a client", _leaving(run) + _figures(run, figures, "traffic")),
        _section("The adapter", _figures(run, figures, "ranks", "spectrum")),
        _section("The seeds", _seeds(run)),
        _section("Recipe", f"<pre>{escape(run.recipe)}</pre>"),
        _section("Provenance", _provenance(run)),
    )
    return page(f"{run.name}: report", "".join(sections))


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>" if body else ""


def figure_card(name: str, title: str, caption: str, figure: Figure, numbers: str) -> str:
    """Return one figure with its caption and the numbers it is drawn from."""
    drawing = svg(figure, name=name, title=escape(title))
    return (
        f'<figure class="{name}"><figcaption><b>{escape(title)}</b> {escape(caption)}</figcaption>'
        f'<div class="plot">{drawing}</div>{_details("Numbers", numbers)}</figure>'
    )


def _figures(run: Run, figures: Mapping[str, Figure], *names: str) -> str:
    cards = []
    for name in names:
        title, caption, numbers = CAPTIONS[name]
        if name in figures:
            cards.append(figure_card(name, title, caption, figures[name], numbers(run)))
    return f'<div class="figures">{"".join(cards)}</div>' if cards else ""


def _header(run: Run) -> str:
    done = run.rounds[-1].round
    notes = []
    if run.state == "interrupted":
        notes.append(f"The run was interrupted after round {done}; what follows is its state there.")
    if run.torn:
        notes.append("The last line of rounds.jsonl was cut off by the interruption and is left out.")
    warning = "".join(f'<p class="note">⚠ {escape(note)}</p>' for note in notes)
    versions = ", ".join(f"{name} {version}" for name, version in run.summary.versions.items()) if run.summary else ""
    facts = [
        ("method", run.method),
        ("seed", str(run.seed)),
        ("base", run.summary.base.name if run.summary else ""),
        ("clients", str(len(client_names(run)))),
        ("rounds", str(done)),
        ("state", run.state),
        ("versions", versions),
    ]
    terms = "".join(f"<div><dt>{escape(term)}</dt><dd>{escape(text)}</dd></div>" for term, text in facts if text)
    return f"<header><p>fedtune report</p><h1>{escape(run.name)}</h1><dl>{terms}</dl>{warning}</header>"


def _key_numbers(run: Run) -> str:
    before, after = standings(run)
    tiles = [_loss_tile("test loss", before.test, after.test), _loss_tile("mean of clients", before.mean, after.mean)]
    worst = after.worst.client if after.worst else ""
    tiles.append(_loss_tile("worst client", before.worst, after.worst, note=worst))
    pairs = paired_losses(run)
    if pairs:
        better = sum(last < first for _, first, last in pairs)
        tiles.append(("clients improved", f"{better} of {len(pairs)}", "held-out loss below the base's"))
    up, down = (sum(getattr(record, side) for record in run.rounds) for side in ("bytes_up", "bytes_down"))
    rounds = training_rounds(run)
    each = max(1, sum(len(record.clients) for record in rounds))
    tiles.append(("sent up", bytes_text(up), f"{bytes_text(up / each)} per client and round"))
    tiles.append(("sent down", bytes_text(down), f"{bytes_text(down / each)} per client and round"))
    seconds = float(loss_curve(run).seconds[-1])
    typical = float(np.median([record.seconds for record in rounds])) if rounds else None
    tiles.append(
        (
            "time",
            seconds_text(run.summary.seconds if run.summary else seconds),
            f"{seconds_text(typical)} a round (median)",
        )
    )
    if run.summary and run.summary.trainable and run.summary.base.parameters:
        share = 100 * run.summary.trainable / run.summary.base.parameters
        tiles.append(
            (
                "trainable",
                number_text(run.summary.trainable),
                f"{number_text(share, 2)} % of {number_text(run.summary.base.parameters)}",
            )
        )
    count = len(tables.failures(run))
    tiles.append(("failures", str(count), "see below" if count else "every update was used"))
    boxes = "".join(
        f"<div><dt>{escape(title)}</dt><dd>{escape(value)}</dd><dd>{escape(note)}</dd></div>"
        for title, value, note in tiles
        if value
    )
    return f'<dl class="tiles">{boxes}</dl>'


def _loss_tile(title: str, before: Scores | None, after: Scores | None, note: str = "") -> tuple[str, str, str]:
    if before is None or after is None:
        return title, "", ""
    old, new = finite(before.loss), finite(after.loss)
    if not note and before.perplexity is not None and after.perplexity is not None:
        note = f"perplexity {number_text(before.perplexity, 3)} → {number_text(after.perplexity, 3)}"
    return title, f"{number_text(old)} → {number_text(new)}", note


def _scores(run: Run) -> str:
    before, after = standings(run)
    return _details("All scores, base and tuned", tables.scores(run)) if before != after or before.test else ""


def _devices(run: Run) -> str:
    """Say on which devices the clients are taken to be, and where each number of them comes from."""
    profiles = devices_table(run)
    if not profiles or run.summary is None:
        return ""
    waited = idle(run)
    idled = (
        "" if waited is None else f" Clients waited {100 * waited:.0f} % of the time for the slowest of their round."
    )
    return f"<p>{escape(run.summary.devices.clock)}{idled}</p>" + _details("Device profiles", profiles)


def _sample(run: Run) -> str:
    sample = run.summary.sample if run.summary else None
    if sample is None:
        return ""
    parts = (("prompt", sample.prompt), ("base", sample.before), ("tuned", sample.after))
    return (
        '<div class="sample">'
        + "".join(f"<div><h3>{title}</h3><p>{escape(text)}</p></div>" for title, text in parts)
        + "</div>"
    )


def _failures(run: Run) -> str:
    failures = tables.failures(run)
    if not failures:
        return "<p>None: every update that was asked for came back and was used.</p>"
    rows = [[str(each.round), each.client, each.kind, each.reason] for each in failures]
    listing = tables.table(["round", "client", "what", "reason"], rows, text_columns=4)
    return listing if len(rows) <= 20 else f"<p>{len(rows)} in all.</p>" + _details("All failures", listing)


def _leaving(run: Run) -> str:
    """Say what the server was sent, from what the rounds recorded."""
    sent = [client for record in run.rounds for client in record.clients.values() if client.bytes_up]
    modules = next((record.modules for record in reversed(run.rounds) if record.modules), {})
    parts = []
    if sent:
        sizes = [client.bytes_up or 0 for client in sent]
        low, high = bytes_text(min(sizes)), bytes_text(max(sizes))
        size = low if low == high else f"{low} to {high}"
        parts.append(f"<li>{size} per update, {len(sent)} updates, {bytes_text(sum(sizes))} in all.</li>")
    if modules:
        named = ", ".join(
            f"<code>{escape(kind)}</code> in {len(names)} layers" for kind, names in kinds(modules).items()
        )
        parts.append(f"<li>Tensors: low-rank factors of {len(modules)} modules ({named}).</li>")
    if uses_seeds(run):
        parts.append(
            "<li>Scalars: one signed byte per seed drawn; which seeds these are follows from the client's key. Nothing "
            "of the weights.</li>"
            "<li>The first bytes of the digests of the state and of four blocks rebuilt from it.</li>"
        )
    if any(record.clients for record in run.rounds):
        parts.append(
            f"<li>Numbers: {'' if uses_seeds(run) else 'rank, '}steps, examples, tokens, losses before and after, "
            "seconds, peak memory, norm.</li>"
        )
    if any(client.ratio is not None for record in run.rounds for client in record.clients.values()):
        parts.append(
            "<li>With pruning: the digest of the heads and channels that were kept (with the policy local, which ones; "
            "with vote, a vote for them), where the server asked for it a score of each, tokens of the forward passes "
            "that took, and one number for how much the factors matter to the loss.</li>"
        )
    if not parts:
        return ""
    parts.append(
        f"<li>Training rows are not part of an update. The {'scalars' if uses_seeds(run) else 'factors'} are computed "
        "from them, so a reader of a single update may infer something about its rows: protect it in transit and at "
        "the server.</li>"
    )
    names = "".join(f"<li><code>{escape(name)}</code>, rank {module.rank}</li>" for name, module in modules.items())
    return f"<ul>{''.join(parts)}</ul>" + _details("Every module", f"<ul>{names}</ul>" if names else "")


def uses_seeds(run: Run) -> bool:
    """Return whether the run's clients measure along seeds."""
    return any("seeds_moved" in record.figures for record in run.rounds)


def _seeds(run: Run) -> str:
    """Say how the integers that a run of seeds consists of grew."""
    rows = [
        [
            str(record.round),
            f"{record.figures['seeds_moved']:.0f}",
            f"{record.figures['sum_abs']:.0f}",
            f"{record.figures['displacement_rms']:.3g}",
            f"{record.figures['scalar_step']:.3g}",
            f"{record.figures['rounds_left']:.0f}" if "rounds_left" in record.figures else NOTHING,
        ]
        for record in run.rounds
        if "seeds_moved" in record.figures
    ]
    if not rows:
        return ""
    heads = ["round", "seeds moved", "sum of |A|", "rms change of a weight", "step of a scalar", "rounds left at worst"]
    return (
        "<p>The whole change of the model is the integers of its ledger; rounds left are those for which sums of 32 "
        "bits have room if every scalar were at its bound.</p>" + tables.table(heads, rows, text_columns=0)
    )


def _provenance(run: Run) -> str:
    if run.summary is None:
        return "<p>No summary.json: the run has not finished.</p>"
    base = run.summary.base
    rows = [["base", base.name], ["base digest", base.digest], ["digest of the result", run.summary.adapter_digest]]
    rows.append(["state digest", run.summary.state_digest])
    rows += [[f"version of {name}", version] for name, version in run.summary.versions.items()]
    rows += [[f"machine: {name}", str(value)] for name, value in run.summary.machine.items()]
    return tables.table(["what", "value"], [row for row in rows if row[1]], text_columns=2)
