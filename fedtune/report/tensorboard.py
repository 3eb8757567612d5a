"""A run's records as TensorBoard event files; needs the package tensorboard, not torch or tensorflow."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from fedtune.errors import ExtraError
from fedtune.report.reader import Scores, finite, read_run
from fedtune.rounds.record import Metrics, RoundRecord

FOLDER = "tensorboard"


def write_events(run: Path) -> None:
    """Write `tensorboard/` inside the run directory, in place of the event files of an earlier call.

    Steps are rounds; an event's wall time is the seconds since the run began.

    Raises:
        ExtraError: without the package tensorboard.
        StoreError: if the directory cannot be read.
    """
    content = read_run(run)
    writer = new_writer(run)
    seconds = 0.0
    for record in content.rounds:
        seconds += record.seconds
        write_scalars(writer, record.round, seconds, scalars(record))
    writer.close()


def new_writer(run: Path) -> Any:
    """Return a writer of event files inside the run directory, from which those of earlier writers are removed.

    Raises:
        ExtraError: without the package tensorboard.
    """
    try:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as missing:
        raise ExtraError(
            f"event files need the package tensorboard; got {missing}; "
            'install the extra tensorboard: pip install "fedtune[tensorboard]"'
        ) from missing

    folder = run / FOLDER
    # TensorBoard merges all event files of a folder: an old one would draw every curve twice.
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    return EventFileWriter(str(folder))


def write_scalars(writer: Any, round: int, seconds: float, values: Iterable[tuple[str, float]]) -> None:
    """Write the numbers of one round, so many seconds after the run began."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary

    numbers = [Summary.Value(tag=tag, simple_value=value) for tag, value in values]
    writer.add_event(Event(step=round, wall_time=seconds, summary=Summary(value=numbers)))


def scalars(record: RoundRecord) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) for every finite number that a round is drawn by."""
    yield from round_scalars(record)
    yield from client_scalars(record)
    modules = [
        named
        for name, module in record.modules.items()
        for named in ((f"rank/{name}", float(module.rank)), (f"energy_kept/{name}", finite(module.energy_kept)))
    ]
    yield from only_finite(modules)


def round_scalars(record: RoundRecord) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of a round as a whole, which name no client."""
    statuses = [client.status for client in record.clients.values()]
    named = [
        ("loss/training_before", finite(record.loss_before)),
        ("loss/training_after", finite(record.loss_after)),
        ("traffic/bytes_up", float(record.bytes_up)),
        ("traffic/bytes_down", float(record.bytes_down)),
        ("time/seconds", record.seconds),
        ("clients/used", float(statuses.count("ok"))),
        ("clients/failed", float(statuses.count("failed"))),
        ("clients/late", float(statuses.count("late"))),
        ("clients/refused", float(statuses.count("refused"))),
    ]
    yield from only_finite([*named, *(_scores("test", record.test) if record.test else ())])


def client_scalars(record: RoundRecord) -> Iterator[tuple[str, float]]:
    """Yield the finite numbers of each client, by its name."""
    for name, metrics in record.held_out.items():
        yield from only_finite(_scores(f"held_out/{name}", metrics))
    for name, client in record.clients.items():
        losses = (("before", client.loss_before), ("after", client.loss_after))
        yield from only_finite([(f"training/{name}/{when}", finite(loss)) for when, loss in losses])


def only_finite(named: Iterable[tuple[str, float]]) -> Iterator[tuple[str, float]]:
    return ((tag, value) for tag, value in named if math.isfinite(value))


def _scores(prefix: str, metrics: Metrics) -> list[tuple[str, float]]:
    names = [entry.name for entry in fields(Scores) if entry.name not in ("examples", "tokens")]
    return [(f"{prefix}/{name}", finite(metrics.get(name))) for name in names]
