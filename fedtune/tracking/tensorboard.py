"""A run's rounds as TensorBoard event files, written as the rounds end."""

from __future__ import annotations

from typing import Any

from fedtune.report.tensorboard import FOLDER, new_writer, write_scalars
from fedtune.tracking.tracker import Ending, Rows, TrackedRun


class EventFiles:
    """The event files inside a run directory."""

    id = ""
    """None: they are written anew by each process, from round 0 on."""

    def __init__(self, writer: Any, place: str) -> None:
        self._writer, self.place, self._seconds = writer, place, 0.0

    def log(self, rows: Rows) -> None:
        for round, values in rows:
            self._seconds += values.get("time/seconds", 0.0)
            write_scalars(self._writer, round, self._seconds, values.items())
        self._writer.flush()

    def end(self, ending: Ending) -> None:
        """Close the files; the result lies beside them already."""
        self._writer.close()


def start(run: TrackedRun) -> EventFiles:
    """Begin `tensorboard/` inside the run directory anew; see `Tracker`."""
    return EventFiles(new_writer(run.folder), str(run.folder / FOLDER))
