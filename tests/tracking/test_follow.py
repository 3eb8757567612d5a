from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from fedtune.rounds.events import Event, Note, RoundFinished
from fedtune.rounds.record import RoundRecord
from fedtune.store.round_records import append_round
from fedtune.tracking import follow as follow_module
from fedtune.tracking.follow import follow
from fedtune.tracking.tracker import Ending
from tests.tracking.conftest import Remembered

Unfold = Callable[..., tuple[Path, Sequence[RoundRecord]]]


def run_rounds(run: Path, records: Sequence[RoundRecord], watch: Callable[[Event], None]) -> None:
    for record in records:
        append_round(run, record)
        watch(RoundFinished(record))


def test_every_round_arrives_before_the_run_is_over(unfolded: Unfold, remembered: Remembered) -> None:
    run, records = unfolded()
    seen: list[Event] = []
    with follow(run, ["mlflow"], seen.append, title="ward", result=lambda: run / "adapter") as watch:
        run_rounds(run, records, watch)
    assert [round for round, _ in remembered.rows] == [0, 1, 2, 3, 4]
    assert remembered.endings == [Ending("finished", run / "adapter")]
    assert [event for event in seen if isinstance(event, Note)] == [Note("mlflow: memory")]
    assert len(seen) == 6


def test_without_a_tracker_the_observer_is_the_same(tmp_path: Path) -> None:
    def watch(event: Event) -> None: ...

    with follow(tmp_path, [], watch) as given:
        assert given is watch


def test_a_tracker_that_fails_costs_a_note_and_the_others_go_on(unfolded: Unfold, remembered: Remembered) -> None:
    run, records = unfolded()
    broken, notes = Remembered(), list[str]()
    broken.broken = OSError("no space left on device\n\na page of advice")
    trackers: dict[Any, Any] = {"mlflow": remembered.start, "wandb": broken.start}

    def starts(name: Any, folder: Path, **options: Any) -> Any:
        return SenderOf(trackers[name], name, folder)

    def note(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    with follow(run, ["wandb", "mlflow"], note, starts=starts) as watch:
        run_rounds(run, records, watch)
    assert [round for round, _ in remembered.rows] == [0, 1, 2, 3, 4]
    failed = [text for text in notes if "no space" in text]
    assert failed == [
        f"wandb: no space left on device; the run is not tracked; afterwards: fedtune report {run} --track wandb"
    ]


class SenderOf:
    """A sender without notes on the disk."""

    def __init__(self, start: Any, name: str, run: Path) -> None:
        self.tracker, self.place, self.sent = start(run), name, -1

    def send(self, records: Sequence[RoundRecord]) -> None:
        new = [record for record in records if record.round > self.sent]
        if new:
            self.tracker.log([(record.round, {}) for record in new])
            self.sent = new[-1].round

    def end(self, ending: Ending) -> None:
        self.tracker.end(ending)


def test_a_tracker_that_never_answers_does_not_delay_a_round_and_is_left_at_the_end(
    unfolded: Unfold, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, records = unfolded()
    answer, notes = threading.Event(), list[str]()
    monkeypatch.setattr(follow_module, "END_S", 0.05)

    def starts(*arguments: Any, **options: Any) -> Any:
        answer.wait()
        raise OSError("too late")

    with follow(run, ["mlflow"], lambda event: notes.append(getattr(event, "text", "")), starts=starts) as watch:
        run_rounds(run, records, watch)
    answer.set()
    assert "mlflow: no answer within 0 s; afterwards:" in notes[-1]


def test_a_run_that_stops_is_ended_as_interrupted(unfolded: Unfold, remembered: Remembered) -> None:
    run, records = unfolded()

    def stop() -> None:
        with follow(run, ["mlflow"], lambda event: None) as watch:
            run_rounds(run, records[:2], watch)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert remembered.endings == [Ending("interrupted")]
    assert [round for round, _ in remembered.rows] == [0, 1]


def test_a_run_that_ends_before_its_first_round_starts_no_tracker(unfolded: Unfold, remembered: Remembered) -> None:
    run, _ = unfolded()
    with follow(run, ["mlflow"], lambda event: None):
        pass
    assert not remembered.begun


def test_rounds_of_one_second_travel_together(unfolded: Unfold, remembered: Remembered) -> None:
    run, records = unfolded(rounds=40)
    with follow(run, ["mlflow"], lambda event: None) as watch:
        run_rounds(run, records, watch)
    assert [round for round, _ in remembered.rows] == list(range(41))
    assert len(remembered.requests) < 20
