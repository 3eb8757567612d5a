from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import StoreError
from fedtune.search.steps import Cost, Result, Step
from fedtune.store.search_journal import NAME, SearchJournal, copy_run, read_search

FIRST = Step(0, 3, {"client.learning_rate": 0.1 + 0.2, "adapter.targets": ("q_proj", "v_proj"), "method": "flora"})
SECOND = Step(1, 6, {"client.steps": 4}, since=3, segment=1, source=0, source_segment=0)
DONE = Result(FIRST, 1 / 3, cost=Cost(9, 100, 50, 0.1), scores={0: 4.5, 3: 1 / 3}, state="ab" * 32)


def test_what_was_written_is_replayed_to_the_bit(tmp_path: Path) -> None:
    with SearchJournal.open(tmp_path) as journal:
        assert (journal.inputs, journal.results, journal.step) == ({}, [], None)
        journal.begin({"recipe": "x"})
        journal.start(FIRST)
        journal.finish(DONE)
        journal.start(SECOND)
    with SearchJournal.open(tmp_path) as journal:
        assert journal.results == [DONE]
        assert journal.step == SECOND
        journal.begin({"recipe": "y"})
        journal.finish(Result(SECOND, None, reason="the loss is not finite"))
    inputs, results = read_search(tmp_path)
    assert inputs == {"recipe": "x"}
    assert results == [DONE, Result(SECOND, None, reason="the loss is not finite")]


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_the_torn_end_of_a_crash_is_cut_off(tmp_path: Path, cut: int) -> None:
    with SearchJournal.open(tmp_path) as journal:
        journal.begin({"recipe": "x"})
        journal.start(FIRST)
        journal.finish(DONE)
    data = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(data[:-cut])
    with SearchJournal.open(tmp_path) as journal:
        assert (journal.results, journal.step) == ([], FIRST)
        journal.finish(DONE)
    assert read_search(tmp_path)[1] == [DONE]


def test_damage_is_refused_by_its_record(tmp_path: Path) -> None:
    with SearchJournal.open(tmp_path) as journal:
        journal.begin({"recipe": "x"})
        journal.start(FIRST)
        journal.finish(DONE)
    data = bytearray((tmp_path / NAME).read_bytes())
    data[60] ^= 1
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(StoreError, match="record 0"):
        read_search(tmp_path)


def test_a_result_without_its_step_is_refused(tmp_path: Path) -> None:
    with SearchJournal.open(tmp_path) as journal:
        journal.begin({"recipe": "x"})
        journal.finish(DONE)
    with pytest.raises(StoreError, match=r"record 1 \(result\).*in turn; got 'result'; put back a copy"):
        read_search(tmp_path)
    with pytest.raises(StoreError, match="expected the folder of a search; got none; make one with fedtune search"):
        read_search(tmp_path / "none")


def test_two_processes_do_not_write_one_search(tmp_path: Path) -> None:
    with (
        SearchJournal.open(tmp_path),
        pytest.raises(StoreError, match="no other process"),
        SearchJournal.open(tmp_path),
    ):
        pass


def test_a_copied_run_is_there_whole_and_without_its_lock(tmp_path: Path) -> None:
    source = tmp_path / "000"
    (source / "blobs").mkdir(parents=True)
    (source / "blobs" / "ab").write_bytes(b"state")
    (source / "journal").write_bytes(b"journal")
    copy_run(source, tmp_path / "001-1")
    files = {path.relative_to(tmp_path / "001-1").as_posix() for path in (tmp_path / "001-1").rglob("*")}
    assert files == {"blobs", "blobs/ab", "journal"}
    assert {path.name for path in tmp_path.iterdir()} == {"000", "001-1"}
