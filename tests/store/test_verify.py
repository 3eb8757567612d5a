from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import StoreError
from fedtune.messages import Failure
from fedtune.methods.serialization import digest
from fedtune.store import verify as verify_module
from fedtune.store.blobs import Blobs
from fedtune.store.history import History, replay_journal
from fedtune.store.journal import End
from fedtune.store.run_directory import write_recipe
from fedtune.store.run_journal import RunJournal
from fedtune.store.verify import Verified, status, verify

INPUTS = {"recipe": "rounds = 2"}
COHORT = {"ann": 3, "bob": 4}
ORDERS = {"ann": "a", "bob": "b"}


def begin(ledger: RunJournal, round: int, state: str, *clients: str) -> None:
    ledger.open(round, state=state, cohort=COHORT, digests=ORDERS)
    for client in clients:
        ledger.accept(round, client, f"{client} in {round}".encode())


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run that was killed while its second round waited for bob."""
    with RunJournal.create(tmp_path, group_s=0) as ledger:
        ledger.begin(INPUTS)
        begin(ledger, 1, "0" * 64, "ann")
        ledger.close(1, {"bob": Failure.from_text("bob", "late", kind="late")}, {"bob": 0})
        state = ledger.commit(1, [b"state 1"])
        begin(ledger, 2, state, "ann")
    return tmp_path


def test_a_run_says_where_it_stands(run: Path) -> None:
    found = status(run)
    assert (found.begun, found.inputs) == (True, INPUTS)
    assert (found.committed, found.state, found.finished) == (1, digest([b"state 1"]), False)
    assert (found.open, found.missing) == (2, ["bob"])
    assert (found.epochs, found.holder) == (1, None)
    assert found.num_bytes == sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    with RunJournal.reopen(run) as ledger:
        ledger.begin(INPUTS)
        assert status(run).holder == str(os.getpid())
        assert status(run).epochs == 2
        assert status(run).run == found.run
        ledger.accept(2, "bob", b"bob in 2")
        ledger.close(2, {}, {})
        assert (status(run).open, status(run).missing) == (2, [])
        ledger.commit(2, [b"state 2"])
        ledger.finish(2)
        assert (status(run).committed, status(run).open, status(run).finished) == (2, None, True)


def nowhere(run: Path) -> bool:
    found = status(run)
    return (found.begun, found.run, found.inputs, found.committed, found.state) == (False, "", {}, 0, "")


def test_a_run_that_was_stopped_before_it_began_stands_nowhere_and_is_not_damaged(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="expected a run directory"):
        status(tmp_path)
    write_recipe(tmp_path, "rounds = 2")
    assert nowhere(tmp_path)
    with RunJournal.create(tmp_path):
        assert nowhere(tmp_path)
    (tmp_path / "journal").write_bytes(b"torn")
    assert nowhere(tmp_path)


def test_a_folder_or_file_that_vanishes_while_a_run_is_measured_counts_nothing(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = sum(path.stat().st_size for path in run.rglob("*") if path.is_file())
    for name in ("adapter", "going"):
        (run / name).mkdir()
        (run / name / "file").write_text("going")
    scan, look = os.scandir, os.lstat

    def scanned(path: str) -> Any:
        if Path(path) == run / "adapter" and (run / "adapter").exists():
            (run / "adapter" / "file").unlink()
            (run / "adapter").rmdir()
        return scan(path)

    def looked(path: str) -> os.stat_result:
        if Path(path) == run / "going" / "file":
            os.unlink(path)
        return look(path)

    monkeypatch.setattr(os, "scandir", scanned)
    monkeypatch.setattr(os, "lstat", looked)
    assert verify_module.size(run) == left
    assert [path.name for path in run.iterdir() if path.name in ("adapter", "going")] == ["going"]


def test_a_whole_run_is_verified_beside_its_writer(run: Path) -> None:
    found = verify(run)
    assert found == Verified(records=7, epochs=1, committed=1, blobs=2, num_bytes=len(b"state 1ann in 2"), torn_bytes=0)
    with RunJournal.reopen(run):
        assert verify(run) == found


def test_a_torn_tail_is_told_and_no_fault(run: Path) -> None:
    with (run / "journal").open("ab") as journal:
        journal.write(b"torn")
    assert verify(run).torn_bytes == 4


def test_the_first_damaged_record_is_named(run: Path) -> None:
    data = bytearray((run / "journal").read_bytes())
    data[20] ^= 1
    (run / "journal").write_bytes(data)
    with pytest.raises(StoreError, match="journal, record 0: expected the checksum"):
        verify(run)


@pytest.mark.parametrize("number", [0, 1])
def test_every_needed_blob_is_looked_at(run: Path, number: int) -> None:
    name, what = sorted(replay_journal(run)[0].needed().items())[number]
    path = Blobs(run / "blobs").path(name)
    data = path.read_bytes()
    for spoil, message in ((lambda: path.write_bytes(data[1:]), "of digest"), (path.unlink, "it is missing")):
        spoil()
        with pytest.raises(StoreError, match=f"{name}: expected {what}.*{message}"):
            verify(run)


def test_a_damaged_last_record_is_named_before_the_blob_that_it_let_go_of(run: Path) -> None:
    with RunJournal.reopen(run) as ledger:
        ledger.begin(INPUTS)
        ledger.close(2, {"bob": Failure.from_text("bob", "late", kind="late")}, {"bob": 0})
        ledger.commit(2, [b"state 2"])
        before = replay_journal(run)[1]
        ledger.finish(2)
    data = bytearray((run / "journal").read_bytes())
    data[-1] ^= 1
    (run / "journal").write_bytes(data)
    torn = len(data) - before.num_bytes
    with pytest.raises(
        StoreError,
        match=rf"journal, record {before.count} at byte {before.num_bytes}: .*; got {torn} bytes, .*; then .*missing",
    ):
        verify(run)
    with RunJournal.reopen(run) as ledger:
        ledger.begin(INPUTS)
        assert ledger.resume(2) == b"state 2"
        ledger.finish(2)
    assert verify(run).torn_bytes == 0


def test_a_blob_that_nothing_needs_is_looked_at_too(run: Path) -> None:
    blobs = Blobs(run / "blobs")
    name = blobs.put([b"of no record"])
    assert verify(run).blobs == 3
    blobs.path(name).write_bytes(b"spoilt")
    with pytest.raises(StoreError, match=f"{name}: expected a whole blob"):
        verify(run)


def test_a_blob_that_a_running_run_lets_go_of_meanwhile_is_no_fault(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look, looked = verify_module.check_run_files, list[Mapping[str, str]]()

    def meanwhile(run: Path, history: History, end: End) -> Verified:
        if not looked:
            with RunJournal.reopen(run) as ledger:
                ledger.begin(INPUTS)
                ledger.accept(2, "bob", b"bob in 2")
                ledger.close(2, {}, {})
                begin(ledger, 3, ledger.commit(2, [b"state 2"]))
        looked.append(history.needed())
        return look(run, history, end)

    monkeypatch.setattr(verify_module, "check_run_files", meanwhile)
    assert verify(run).committed == 2
    assert looked[0] != looked[1]
