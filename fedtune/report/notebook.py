"""A run as a cell of a notebook shows it: the headline and the losses of its rounds."""

from __future__ import annotations

from pathlib import Path

from fedtune.report.headline import headline
from fedtune.report.reader import read_run
from fedtune.report.rendering import render
from fedtune.report.tables import losses


def run_html(path: Path) -> str:
    """Return a part of a page on a run.

    Raises:
        StoreError: if the directory cannot be read.
    """
    run = read_run(path)
    return render("notebook.html.j2", run=run, headline=headline(run), losses=losses(run))
