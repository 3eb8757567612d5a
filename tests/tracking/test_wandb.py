from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.tracking.sending import Sender, read_sent
from fedtune.tracking.tracker import Ending
from tests.report.conftest import WriteRun

pytestmark = pytest.mark.filterwarnings("ignore")  # of another package


@pytest.fixture
def wandb(alone: Path) -> Any:
    return pytest.importorskip("wandb", reason="needs wandb, which no extra of fedtune brings")


def test_without_a_key_a_run_is_written_offline_and_says_nothing_of_the_machine(
    wandb: Any, write_run: WriteRun, capfd: pytest.CaptureFixture[str]
) -> None:
    import socket

    from fedtune.store.round_records import read_rounds

    run = write_run(clients=3, rounds=4)
    sender = Sender("wandb", run, title="ward")
    sender.send(read_rounds(run))
    sender.end(Ending("finished"))
    id = read_sent(run / "trackers" / "wandb.json").id
    assert f"wandb sync --id {id}" in sender.place
    (folder,) = (run / "wandb").glob(f"offline-run-*-{id}")
    files = {path.name for path in folder.rglob("*") if path.is_file()}
    assert not {"wandb-metadata.json", "requirements.txt", "output.log"} & files
    data = (folder / f"run-{id}.wandb").read_bytes()
    assert b"test/loss" in data
    assert b"client-" not in data
    assert b"/".join([b"", b"tmp", b"pytest"]) not in data
    assert socket.gethostname().encode() not in data or len(socket.gethostname()) < 4
    assert not capfd.readouterr().out


def test_a_resumed_run_has_the_same_id_in_another_folder(wandb: Any, write_run: WriteRun) -> None:
    from fedtune.store.round_records import read_rounds

    run = write_run(clients=3, rounds=4)
    for records in (read_rounds(run)[:2], read_rounds(run)):
        sender = Sender("wandb", run)
        sender.send(records)
        sender.end(Ending("interrupted"))
    sent = read_sent(run / "trackers" / "wandb.json")
    assert sent.round == 4
    assert list((run / "wandb").glob(f"offline-run-*-{sent.id}"))
