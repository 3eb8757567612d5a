from __future__ import annotations

import sys

import pytest

from fedtune.errors import ExtraError
from fedtune.report.reader import read_run
from fedtune.report.tensorboard import scalars, write_events
from tests.report.conftest import WriteRun


def test_events_read_back_as_they_were_recorded(write_run: WriteRun) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    path = write_run(clients=2, rounds=3)
    write_events(path)
    write_events(path)  # takes the place of the first
    files = list((path / "tensorboard").iterdir())
    assert len(files) == 1
    events = accumulator.EventAccumulator(str(path / "tensorboard"))
    events.Reload()
    test = events.Scalars("test/loss")
    assert [event.step for event in test] == [0, 1, 2, 3]
    assert test[1].value == pytest.approx(2.85)
    assert [event.wall_time for event in test] == [0.5, 2.5, 4.5, 6.5]
    assert [event.value for event in events.Scalars("traffic/bytes_up")] == [0, 2000, 2000, 2000]
    assert [event.step for event in events.Scalars("loss/training_after")] == [1, 2, 3]


def test_every_scalar_has_its_own_tag_and_is_finite(write_run: WriteRun) -> None:
    record = read_run(write_run(clients=3, rounds=1)).rounds[1]
    tags = [tag for tag, _ in scalars(record)]
    assert len(tags) == len(set(tags))
    assert "held_out/client-2/perplexity" in tags
    assert "training/client-0/after" not in tags  # it failed


def test_without_the_package_the_extra_is_named(write_run: WriteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard.summary.writer.event_file_writer", None)
    with pytest.raises(ExtraError, match=r'pip install "fedtune\[tensorboard\]"'):
        write_events(write_run())
