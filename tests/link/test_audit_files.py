"""The files of an audit log: one chain over all of them, whatever step of a change of files a crash comes at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import StoreError
from fedtune.link import audit_files
from fedtune.link.audit_files import full_file, full_files
from fedtune.link.audit_log import AuditLog, read_audit_log, record_digests
from fedtune.store import files, journal
from fedtune.store.journal import End, Journal, Record

SMALL = 400
"""Bytes of a full file here: of two or three records."""


class CrashError(BaseException):
    """The process dies."""


def write(path: Path, *kinds: str) -> None:
    """Append entries as one process does, each in a write of its own, without the thread of an audit log."""
    end = audit_files.read(path, lambda record: None)
    current = Journal(path, end)
    try:
        for kind in kinds:
            current.append(kind, {"client": "anna"})
            if current.end.num_bytes >= SMALL:
                current = audit_files.begin_next(path, current)
    finally:
        current.close()


def kinds(path: Path) -> Sequence[str]:
    return [entry.kind for entry in read_audit_log(path).entries] if audit_files.exists(path) else []


NAMES = [f"kind-{place}" for place in range(12)]


@pytest.mark.guarantee("G18")
def test_a_log_over_several_files_is_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    write(path, *NAMES[:6])
    head = read_audit_log(path).head
    write(path, *NAMES[6:])
    assert [file.name for file in full_files(path)][:2] == ["audit.000001", "audit.000002"]
    assert kinds(path) == NAMES
    assert [entry.n for entry in read_audit_log(path).entries] == list(range(12))
    assert {head, read_audit_log(path).head} <= record_digests(path)
    whole = b"".join(file.read_bytes() for file in [*full_files(path), *([path] if path.exists() else [])])
    assert whole.count(b'"kind"') == 12


def test_an_audit_log_goes_on_in_a_new_file_by_itself(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    for place in range(3):
        log = AuditLog(path, full_bytes=SMALL)
        for kind in NAMES[4 * place : 4 * place + 4]:
            log.record(kind, client="anna")
        log.close()
    assert kinds(path) == NAMES
    assert len(full_files(path)) >= 2


@pytest.mark.guarantee("G18")
def test_a_crash_at_any_step_of_a_change_of_files_loses_nothing_that_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: Any
) -> None:
    steps = ("append_to", "write", "sync", "sync_folder", "rename")
    # What is not synced counts as lost only after a power cut, which test_crash.py has; here the steps count.
    originals = {name: getattr(files, name) for name in steps} | {"sync": lambda *arguments: None}

    def crash_at(number: int, *, after: bool) -> list[str]:
        taken = list[str]()

        def step(name: str, *arguments: Any) -> Any:
            taken.append(name)
            if len(taken) == number and not after:
                if name == "write":  # half of it is on the disk
                    originals[name](arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise CrashError
            result = originals[name](*arguments)
            if len(taken) == number:
                raise CrashError
            return result

        for name in steps:
            monkeypatch.setattr(files, name, lambda *arguments, name=name: step(name, *arguments))
        return taken

    number, crashed = 0, True
    while crashed:
        number, crashed = number + 1, False
        for after in (False, True):
            path = tmp_path / f"{number}-{after}" / "audit"
            path.parent.mkdir()
            crash_at(number, after=after)
            try:
                write(path, *NAMES[:6])
            except CrashError:
                crashed = True
            monkeypatch.undo()
            monkeypatch.setattr(files, "sync", originals["sync"])
            before = kinds(path)
            assert before == NAMES[: len(before)]
            write(path, *NAMES[len(before) : 6])
            assert kinds(path) == NAMES[:6]
            assert [entry.n for entry in read_audit_log(path).entries] == list(range(6))
            cases(1)
    assert number > 20


@pytest.mark.guarantee("G18")
@pytest.mark.parametrize("change", ["remove the first", "remove the second", "flip a bit", "cut the end", "swap"])
def test_a_full_file_that_was_changed_is_named(tmp_path: Path, change: str) -> None:
    path = tmp_path / "audit"
    write(path, *NAMES)
    first, second = full_file(path, 1), full_file(path, 2)
    match change:
        case "remove the first":
            first.unlink()
        case "remove the second":
            second.unlink()
        case "flip a bit":
            data = bytearray(first.read_bytes())
            data[100] ^= 1
            first.write_bytes(data)
        case "cut the end":
            first.write_bytes(first.read_bytes()[:-3])
        case "swap":
            earlier = first.read_bytes()
            first.write_bytes(second.read_bytes())
            second.write_bytes(earlier)
    with pytest.raises(StoreError, match=r"audit\.00000[12]"):
        read_audit_log(path)
    with pytest.raises(StoreError, match=r"audit\.00000[12]"):
        AuditLog(path)


def test_a_reader_meets_a_file_that_has_just_become_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "audit"
    write(path, *NAMES[:3])
    original, moved = journal.read, list[int]()

    def read(file: Path, apply: Any, *, after: End | None = None) -> End:
        if not moved:
            moved.append(1)
            write(path, *NAMES[3:])  # between the list of full files and the newest one
        return original(file, apply, after=after)

    monkeypatch.setattr(journal, "read", read)
    records = list[Record]()
    audit_files.read(path, records.append)
    assert [record.kind for record in records] == NAMES


def test_a_disk_that_fails_at_a_change_of_files_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(source: Path, target: Path) -> None:
        raise OSError(5, "Input/output error")

    events, path = list[StoreError](), tmp_path / "audit"
    monkeypatch.setattr(files, "rename", fail)
    log = AuditLog(path, on_failure=events.append, full_bytes=10)
    log.record("asked", client="anna")
    log.close()
    assert len(events) == 1
    assert kinds(path) == ["asked"]
