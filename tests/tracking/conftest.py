"""Runs to track, and a tracker that only remembers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedtune.rounds.record import RoundRecord
from fedtune.store.round_records import append_round, read_rounds
from fedtune.tracking import sending
from fedtune.tracking.tracker import Ending, Rows, TrackedRun
from tests.report.conftest import WriteRun
from tests.report.conftest import write_run as write_run


class Remembered:
    """A tracker that keeps what it is given; `broken` raises from then on."""

    def __init__(self) -> None:
        self.begun: list[TrackedRun] = []
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.requests: list[list[int]] = []
        self.endings: list[Ending] = []
        self.broken: Exception | None = None
        self.forgets = False
        self.id, self.place = "run-1", "memory"

    def start(self, run: TrackedRun) -> Remembered:
        self.begun.append(run)
        if self.forgets:
            self.id = f"run-{len(self.begun)}"
        return self

    def log(self, rows: Rows) -> None:
        if self.broken:
            raise self.broken
        self.requests.append([round for round, _ in rows])
        self.rows += [(round, dict(values)) for round, values in rows]

    def end(self, ending: Ending) -> None:
        self.endings.append(ending)


@pytest.fixture
def remembered(monkeypatch: pytest.MonkeyPatch) -> Remembered:
    """Return a tracker in the place of MLflow's."""
    tracker = Remembered()
    monkeypatch.setattr(sending, "TRACKERS", {**sending.TRACKERS, "mlflow": tracker.start})
    return tracker


@pytest.fixture
def unfolded(write_run: WriteRun) -> Callable[..., tuple[Path, Sequence[RoundRecord]]]:
    """Return a run directory before its first round, and the records to append to it."""

    def unfold(**options: Any) -> tuple[Path, Sequence[RoundRecord]]:
        run = write_run(**{"clients": 3, "rounds": 4, **options})
        records = read_rounds(run)
        for name in ("rounds.jsonl", "summary.json"):
            (run / name).unlink()
        return run, records

    return unfold


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder, with an environment that names no tracker's server and no key."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith(("MLFLOW_", "WANDB_", "TRACKIO_")):
            monkeypatch.delenv(name)
    # Else a key of the machine's user would be found, and the run sent to a server.
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    return tmp_path


def append_all(run: Path, records: Sequence[RoundRecord]) -> None:
    for record in records:
        append_round(run, record)
