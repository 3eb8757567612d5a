"""Draws the picture of loss against bytes in `docs/benchmarks.md`, from finished runs of `simulations/bytes`.

Run from the repository's root: python docs/bytes_picture.py runs/bytes/*-seed*; a line joins the runs of a recipe that
differ in bits or rank.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev

from fedtune.report.drawing import COLOURS, MARKERS, new_figure, png, with_style

TARGET = Path(__file__).parent / "images" / "loss-against-bytes.png"
Point = tuple[float, float]
"""Bytes that a client sends in a round, and the loss on the test data after the last round."""


def point(run: Path) -> tuple[str, str, Point]:
    """Return a run's line, its place on that line, and where it lies."""
    summary = json.loads((run / "summary.json").read_text())
    recipe = summary["name"]
    sent = summary["bytes_up"] / summary["rounds"] / len(summary["clients"])
    kind, *parts = recipe.split("-")
    line = {"descend": f"descend, G = {parts[0][1:]}", "lora": f"LoRA, {parts[-1]}"}.get(kind, kind) if parts else kind
    return line, recipe, (sent, summary["after"]["test"]["loss"])


@with_style
def picture(points: Sequence[tuple[str, str, Point]]) -> bytes:
    """Return the picture as PNG: mean and standard deviation over the seeds of each recipe."""
    lines: Mapping[str, Mapping[str, list[Point]]] = defaultdict(lambda: defaultdict(list))
    for line, recipe, place in points:
        lines[line][recipe].append(place)
    figure = new_figure(7.2, 4.2)
    axes = figure.subplots()
    for number, (line, recipes) in enumerate(sorted(lines.items())):
        rows = sorted(
            (mean(x for x, _ in seeds), mean(y for _, y in seeds), stdev([y for _, y in seeds]) if seeds[1:] else 0.0)
            for seeds in recipes.values()
        )
        sent, losses, spreads = zip(*rows, strict=True)
        colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
        axes.errorbar(sent, losses, spreads, color=colour, marker=marker, markersize=5, capsize=2, label=line)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("bytes up, of a client in a round")
    axes.set_ylabel("loss at the end (nats per token)")
    axes.legend(frameon=False)
    return png(figure)


if __name__ == "__main__":
    TARGET.write_bytes(picture([point(Path(run)) for run in sys.argv[1:]]))
