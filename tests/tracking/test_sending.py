from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from fedtune.errors import StoreError
from fedtune.rounds.record import RoundRecord
from fedtune.tracking.sending import Sender, Sent, read_sent, replay
from fedtune.tracking.tracker import Ending
from tests.report.conftest import WriteRun
from tests.tracking.conftest import Remembered, append_all

Unfold = Callable[..., tuple[Path, Sequence[RoundRecord]]]


def test_rounds_are_sent_once_and_name_no_client(unfolded: Unfold, remembered: Remembered) -> None:
    run, records = unfolded()
    sender = Sender("mlflow", run, title="ward")
    sender.send(records[:2])
    sender.send(records[:3])
    assert [round for round, _ in remembered.rows] == [0, 1, 2]
    assert remembered.begun[0].name == "ward"
    values = remembered.rows[1][1]
    assert values["test/loss"] == pytest.approx(2.9)
    assert values["traffic/bytes_up"] == 3000
    assert not [name for _, row in remembered.rows for name in row if "client-" in name]
    assert read_sent(run / "trackers" / "mlflow.json") == Sent("run-1", 2)


def test_clients_are_sent_where_that_is_asked_for(unfolded: Unfold, remembered: Remembered) -> None:
    run, records = unfolded()
    Sender("mlflow", run, clients=True).send(records)
    assert "held_out/client-2/loss" in remembered.rows[1][1]


def test_a_resumed_run_goes_on_where_its_tracker_stopped(unfolded: Unfold, remembered: Remembered) -> None:
    run, records = unfolded()
    Sender("mlflow", run).send(records[:2])
    again = Sender("mlflow", run)
    assert remembered.begun[1].id == "run-1"
    again.send(records)
    assert [round for round, _ in remembered.rows] == [0, 1, 2, 3, 4]


def test_a_run_that_the_tracker_has_lost_is_sent_from_its_first_round_on(
    unfolded: Unfold, remembered: Remembered
) -> None:
    run, records = unfolded()
    remembered.forgets = True
    Sender("mlflow", run).send(records[:2])
    Sender("mlflow", run).send(records[:3])
    assert [round for round, _ in remembered.rows] == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"version": 2, "id": "x", "round": 1}', "[" * 100_000])
def test_a_damaged_note_is_named_with_what_to_do(unfolded: Unfold, remembered: Remembered, text: str) -> None:
    run, _ = unfolded()
    (run / "trackers").mkdir()
    (run / "trackers" / "mlflow.json").write_text(text)
    with pytest.raises(StoreError, match=r"mlflow\.json: expected .*; remove the file"):
        Sender("mlflow", run)


def test_a_finished_run_is_replayed_once(write_run: WriteRun, remembered: Remembered) -> None:
    run = write_run(rounds=3)
    assert replay("mlflow", run) == (4, "memory")
    assert replay("mlflow", run) == (0, "memory")
    assert remembered.endings == [Ending("finished"), Ending("finished")]
    assert remembered.requests == [[0, 1, 2, 3]]


def test_a_run_without_a_round_is_not_replayed(unfolded: Unfold, remembered: Remembered) -> None:
    run, records = unfolded()
    with pytest.raises(StoreError, match="expected at least one complete round"):
        replay("mlflow", run)
    append_all(run, records[:1])
    replay("mlflow", run)
    assert remembered.endings == [Ending("interrupted")]
