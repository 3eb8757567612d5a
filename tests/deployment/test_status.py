from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.deployment.status import ClientStatus, client_statuses, load_audit_history, server_status
from fedtune.errors import StoreError
from fedtune.link.audit_log import AuditLog, Entry, read_audit_log


def entries(*events: tuple[str, dict[str, Any]]) -> list[Entry]:
    return [Entry(place, 1000 * place, kind, fields) for place, (kind, fields) in enumerate(events)]


def test_a_client_stands_as_the_log_has_it() -> None:
    result = client_statuses(
        entries(
            ("hello", {"client": "anna", "build": "x"}),
            ("asked", {"client": "anna", "round": 1, "bytes": 100}),
            ("answered", {"client": "anna", "round": 1, "bytes": 30}),
            ("used", {"client": "anna", "round": 1}),
            ("asked", {"client": "anna", "round": 2, "bytes": 100}),
            ("unused", {"client": "anna", "round": 2, "why": "late", "reason": "no answer in 60 s"}),
            ("asked", {"client": "bob", "round": 2, "bytes": 7}),
            ("lost", {"client": "bob", "round": 2, "reason": "no sign of life for 600 s"}),
            ("refused", {"client": "carl", "reason": "REVOKED: ..."}),
            ("committed", {"round": 2}),
        )
    )
    assert result["anna"] == ClientStatus("anna", "here", 3000, 1, 30, 200, "round 2: no answer in 60 s")
    assert (result["bob"].state, result["bob"].error) == ("away", "round 2: no sign of life for 600 s")
    assert result["carl"].error == "REVOKED: ..."


def test_how_long_ago_is_shown_in_one_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.deployment.status.time.time", lambda: 1_000_000.0)
    for seconds, text in ((5, "5 s ago"), (120, "2 min ago"), (7200, "2 h ago"), (200_000, "2 d ago")):
        assert ClientStatus("a", seen_ms=1000 * (1_000_000 - seconds)).seen == text


def test_a_run_of_another_command_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="fedtune runs status"):
        server_status(tmp_path)


def test_a_log_is_found_in_a_run_in_a_state_folder_or_by_its_own_path(tmp_path: Path) -> None:
    path = tmp_path / "run" / "link" / "audit"
    path.parent.mkdir(parents=True)
    log = AuditLog(path)
    log.record("asked", client="anna", bytes=1)
    log.close()
    first = read_audit_log(path).head
    log = AuditLog(path)
    log.record("stopped")
    log.close()
    for place in (tmp_path / "run", path.parent, path):
        assert [one.kind for one in load_audit_history(place).entries] == ["asked", "stopped"]
    assert load_audit_history(path, head=first.upper()).head != first
    with pytest.raises(StoreError, match="written anew"):
        load_audit_history(path, head="ab" * 32)
    with pytest.raises(StoreError, match="expected an audit log"):
        load_audit_history(tmp_path / "nowhere")
