"""A run in Trackio: in its local database, or on the server or Space that its environment names."""

from __future__ import annotations

import os
import secrets
import sys
from typing import Any

from fedtune.tracking.tracker import PROJECT, Ending, Rows, TrackedRun, without_password

SPEAKING = ("trackio", "trackio.run", "trackio.utils")
"""Modules that print what they do."""


class TrackioRun:
    """One run of a project, which Trackio knows by its name."""

    def __init__(self, run: Any, project: str) -> None:
        self._run, self.id = run, str(run.name)
        where = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL") or "the local database"
        self.place = f"run {self.id} of the project {project!r} in {without_password(where).partition('?')[0]}"

    def log(self, rows: Rows) -> None:
        for round, values in rows:
            self._run.log(dict(values), step=round)

    def end(self, ending: Ending) -> None:
        if ending.result is not None:
            self._run.log_artifact(ending.result, name=f"{self.id}-{ending.result.name}", type="model")
        self._run.finish()


def start(run: TrackedRun) -> TrackioRun:
    """Begin a run, or go on with the one of its id; see `Tracker`."""
    import trackio

    # Standard output is the command's result. Its own name for the function, in its modules alone: another stream would
    # be put in place for all threads.
    for name in SPEAKING:
        if name in sys.modules:
            sys.modules[name].print = say_nothing  # type: ignore[attr-defined]
    project = os.environ.get("TRACKIO_PROJECT") or PROJECT
    created = trackio.init(
        project=project,
        name=run.id or f"{run.name}-{secrets.token_hex(4)}",
        resume="allow",
        config={**run.parameters, **run.tags},
        embed=False,
        # What this machine does is not asked for.
        auto_log_gpu=False,
        auto_log_cpu=False,
    )
    return TrackioRun(created, project)


def say_nothing(*texts: object, **options: object) -> None:
    """Take the place of `print`."""
