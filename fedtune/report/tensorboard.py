"""A run's records as TensorBoard event files; needs the package tensorboard, not torch or tensorflow."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

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
    try:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter
    except ImportError as missing:
        raise ExtraError(
            f"event files need the package tensorboard; got {missing}; "
            'install the extra tensorboard: pip install "fedtune[tensorboard]"'
        ) from missing

    content = read_run(run)
    folder = run / FOLDER
    # TensorBoard merges all event files of a folder: an old one would draw every curve twice.
    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    writer = EventFileWriter(str(folder))
    seconds = 0.0
    for record in content.rounds:
        seconds += record.seconds
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars(record)]
        writer.add_event(Event(step=record.round, wall_time=seconds, summary=Summary(value=values)))
    writer.close()


def scalars(record: RoundRecord) -> Iterator[tuple[str, float]]:
    """Yield (tag, value) for every finite number that a round is drawn by."""
    named = [
        ("loss/training_before", finite(record.loss_before)),
        ("loss/training_after", finite(record.loss_after)),
        ("traffic/bytes_up", float(record.bytes_up)),
        ("traffic/bytes_down", float(record.bytes_down)),
        ("time/seconds", record.seconds),
        ("clients/used", float(sum(client.status == "ok" for client in record.clients.values()))),
        ("clients/failed", float(sum(client.status == "failed" for client in record.clients.values()))),
        ("clients/late", float(sum(client.status == "late" for client in record.clients.values()))),
        ("clients/refused", float(sum(client.status == "refused" for client in record.clients.values()))),
    ]
    if record.test:
        named += _scores("test", record.test)
    for name, metrics in record.held_out.items():
        named += _scores(f"held_out/{name}", metrics)
    for name, client in record.clients.items():
        named += [
            (f"training/{name}/before", finite(client.loss_before)),
            (f"training/{name}/after", finite(client.loss_after)),
        ]
    for name, module in record.modules.items():
        named += [(f"rank/{name}", float(module.rank)), (f"energy_kept/{name}", finite(module.energy_kept))]
    return ((tag, value) for tag, value in named if math.isfinite(value))


def _scores(prefix: str, metrics: Metrics) -> list[tuple[str, float]]:
    names = [entry.name for entry in fields(Scores) if entry.name not in ("examples", "tokens")]
    return [(f"{prefix}/{name}", finite(metrics.get(name))) for name in names]
