from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedtune.rounds.record import RoundRecord
from fedtune.tracking.sending import Sender
from fedtune.tracking.tracker import Ending


def test_event_files_are_written_as_rounds_end_and_anew_by_a_resumed_run(
    unfolded: Callable[..., tuple[Path, Sequence[RoundRecord]]],
) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run, records = unfolded()

    def steps() -> list[tuple[int, float]]:
        events = accumulator.EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        assert not [tag for tag in events.Tags()["scalars"] if "client-" in tag]
        return [(event.step, event.wall_time) for event in events.Scalars("test/loss")]

    first = Sender("tensorboard", run)
    first.send(records[:2])
    assert steps() == [(0, 0.5), (1, 2.5)]
    first.end(Ending("interrupted"))
    again = Sender("tensorboard", run)
    again.send(records)
    again.end(Ending("finished"))
    assert [step for step, _ in steps()] == [0, 1, 2, 3, 4]
    assert len(list((run / "tensorboard").iterdir())) == 1
