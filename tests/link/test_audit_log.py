from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.errors import StoreError
from fedtune.link.audit_log import (
    LOGGER,
    AuditLog,
    ignore_event,
    log_event,
    read_audit_log,
    record_digests,
    record_to_all,
)


def written(path: Path, *kinds: str) -> None:
    log = AuditLog(path)
    for place, kind in enumerate(kinds):
        log.record(kind, client="anna", bytes=place)
    log.close()


def test_a_log_is_read_in_order_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    written(path, "asked", "answered")
    first = read_audit_log(path)
    written(path, "stopped")
    result = read_audit_log(path)
    assert [(one.n, one.kind, one.fields) for one in result.entries] == [
        (0, "asked", {"client": "anna", "bytes": 0}),
        (1, "answered", {"client": "anna", "bytes": 1}),
        (2, "stopped", {"client": "anna", "bytes": 0}),
    ]
    assert all(one.unix_ms > 1.7e12 for one in result.entries)
    assert {first.head, result.head} <= record_digests(path)


@pytest.mark.guarantee("G18")
def test_a_log_that_was_changed_is_refused_and_the_entry_named(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    written(path, "asked", "answered", "stopped")
    data = bytearray(path.read_bytes())
    data[data.index(b"answered")] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="record 1"):
        read_audit_log(path)
    with pytest.raises(StoreError, match="record 1"):
        AuditLog(path)


def test_what_a_crash_left_of_an_entry_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "audit"
    written(path, "asked", "answered")
    path.write_bytes(path.read_bytes()[:-3])
    assert [one.kind for one in read_audit_log(path).entries] == ["asked"]
    written(path, "stopped")
    assert [one.kind for one in read_audit_log(path).entries] == ["asked", "stopped"]


def test_a_log_that_cannot_be_written_is_reported_once(tmp_path: Path) -> None:
    events: list[StoreError] = []
    log = AuditLog(tmp_path / "audit", on_failure=events.append)
    log.record("asked", client="anna", fraction=0.5)  # type: ignore[arg-type]
    log.record("asked", client="anna")
    log.close()
    assert len(events) == 1  # what stood beside it is lost with it
    written(tmp_path / "audit", "stopped")
    assert read_audit_log(tmp_path / "audit").entries[-1].kind == "stopped"


def test_several_recorders_receive_the_same() -> None:
    heard: list[tuple[str, object]] = []
    tell = record_to_all(ignore_event, lambda kind, **fields: heard.append((kind, fields)))
    tell("asked", round=1)
    assert heard == [("asked", {"round": 1})]


def test_without_a_log_the_error_says_what_makes_one(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="fedtune serve"):
        read_audit_log(tmp_path / "audit")


def test_events_reach_the_logger_of_an_application_that_configures_it(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="fedtune.link"):
        log_event("hello", client="anna", roster=3)
    assert caplog.messages == ["hello {'client': 'anna', 'roster': 3}"]
    assert not LOGGER.handlers  # a library leaves handlers and levels to its application
