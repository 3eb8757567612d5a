"""Sends a run's rounds to one tracker, each once: what was sent is noted in the run directory, so a resume goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.report.tensorboard import client_scalars, round_scalars
from fedtune.rounds.record import RoundRecord
from fedtune.store.files import store_errors, write_text
from fedtune.store.round_records import read_rounds
from fedtune.tracking import mlflow, tensorboard, trackio, wandb
from fedtune.tracking.facts import parameters, read_leniently, tags
from fedtune.tracking.tracker import Ending, TrackedRun, Tracker, TrackerName, metric_name

FOLDER, VERSION = "trackers", 1
"""Of the run directory: a file for each tracker, by its name."""

TRACKERS: Mapping[TrackerName, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": tensorboard.start,
    "mlflow": mlflow.start,
    "trackio": trackio.start,
    "wandb": wandb.start,
}
"""Begins a run in a tracker, or goes on with it; imports the tracker's package."""


@dataclass(frozen=True)
class Sent:
    """What of a run a tracker has."""

    id: str = ""
    """By which the tracker knows the run."""
    round: int = -1
    """The last round that was sent; -1 for none."""


class Sender:
    """One run in one tracker; it knows which rounds that has already."""

    def __init__(self, name: TrackerName, run: Path, *, title: str = "", clients: bool = False) -> None:
        """Begin the run in the tracker, or go on with it.

        Args:
            name: of the tracker.
            run: the run directory.
            title: of the run in the tracker; the folder's name without it.
            clients: whether the tracker learns names and losses of single clients.

        Raises:
            StoreError: if the run directory cannot be read.
        """
        self._note, self._clients = run / FOLDER / f"{name}.json", clients
        earlier = read_sent(self._note)
        tracked = TrackedRun(title or run.resolve().name, run, earlier.id, parameters(run), tags(run))
        self._tracker = TRACKERS[name](tracked)
        # Begun anew, or one that keeps nothing: it is sent everything.
        same = bool(earlier.id) and self._tracker.id == earlier.id
        self.sent = earlier.round if same else -1
        write_sent(self._note, Sent(self._tracker.id, self.sent))

    @property
    def place(self) -> str:
        """Where the run is in the tracker, in words."""
        return self._tracker.place

    def send(self, records: Sequence[RoundRecord]) -> None:
        """Send the rounds of which the tracker has no numbers yet."""
        new = [record for record in records if record.round > self.sent]
        if not new:
            return
        self._tracker.log([(record.round, self._numbers(record)) for record in new])
        self.sent = new[-1].round
        write_sent(self._note, Sent(self._tracker.id, self.sent))

    def end(self, ending: Ending) -> None:
        """Say that the run has ended, and wait until the tracker has everything."""
        self._tracker.end(ending)

    def _numbers(self, record: RoundRecord) -> Mapping[str, float]:
        named = [*round_scalars(record), *(client_scalars(record) if self._clients else ())]
        return {metric_name(name): value for name, value in named}


def read_sent(path: Path) -> Sent:
    """Return what a tracker has of a run; nothing where it was never sent any.

    Raises:
        StoreError: if the note is damaged.
    """
    if not path.exists():
        return Sent()
    with store_errors(path):
        data = path.read_bytes()
    try:
        body = json.loads(data)
        if body["version"] != VERSION:
            raise ValueError(f"version {body['version']}")
        return Sent(str(body["id"]), int(body["round"]))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StoreError(
            f"{path}: expected which rounds a tracker was sent; got other text ({error}); "
            "remove the file, and the run is sent again as a new one"
        ) from None


def write_sent(path: Path, sent: Sent) -> None:
    write_text(path, json.dumps({"version": VERSION, "id": sent.id, "round": sent.round}) + "\n")


def replay(
    name: TrackerName, run: Path, *, title: str = "", clients: bool = False, result: Path | None = None
) -> tuple[int, str]:
    """Send the rounds of a run on the disk that a tracker lacks, and return how many those were, and where they are.

    Raises:
        StoreError: if the run directory cannot be read.
    """
    records = read_rounds(run)
    if not records:
        raise StoreError(f"{run}: expected at least one complete round; got none; let the run finish a round first")
    sender = Sender(name, run, title=title, clients=clients)
    before = sender.sent
    sender.send(records)
    finished = read_leniently(run / "summary.json").get("state") == "finished"
    sender.end(Ending("finished" if finished else "interrupted", result))
    return sender.sent - before, sender.place
