from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedtune.deployment.status import ClientStatus, ServerStatus, client_statuses, load_audit_history, server_status
from fedtune.errors import StoreError
from fedtune.link.audit_log import AuditLog, Entry, read_audit_log
from fedtune.store.verify import Status


def entries(*events: tuple[str, dict[str, Any]]) -> list[Entry]:
    return [Entry(place, 1000 * place, kind, fields) for place, (kind, fields) in enumerate(events)]


def test_a_client_stands_as_the_log_has_it() -> None:
    result = client_statuses(
        entries(
            ("enrolled", {"clients": "anna bob carl dora"}),
            ("hello", {"client": "anna", "build": "x"}),
            ("connected", {"client": "anna", "examples": 3}),
            ("asked", {"client": "anna", "round": 1, "bytes": 100}),
            ("answered", {"client": "anna", "round": 1, "bytes": 30}),
            ("used", {"client": "anna", "round": 1}),
            ("asked", {"client": "anna", "round": 2, "bytes": 100}),
            ("unused", {"client": "anna", "round": 2, "why": "late", "reason": "no answer in 60 s"}),
            ("asked", {"client": "bob", "round": 2, "bytes": 7}),
            ("lost", {"client": "bob", "round": 2, "reason": "no sign of life for 600 s"}),
            ("refused", {"client": "carl", "reason": "REVOKED: ...", "code": "REVOKED"}),
            ("committed", {"round": 2}),
        )
    )
    assert result["anna"] == ClientStatus("anna", "connected", 4000, 1, 30, 200, "round 2: no answer in 60 s")
    assert (result["bob"].state, result["bob"].error) == ("away", "round 2: no sign of life for 600 s")
    assert (result["carl"].state, result["carl"].error) == ("refused", "REVOKED: ...")
    assert (result["dora"].state, result["dora"].seen) == ("never seen", "never")


def test_a_site_that_does_not_fit_is_refused_until_it_comes_anew_and_is_taken() -> None:
    story: list[tuple[str, dict[str, Any]]] = [
        ("hello", {"client": "anna"}),
        ("unfit", {"client": "anna", "reason": "expected the base ab; got cd"}),
        ("left", {"client": "anna"}),
        ("hello", {"client": "anna"}),
        ("connected", {"client": "anna", "examples": 3}),
        ("left", {"client": "anna"}),
    ]
    states = [client_statuses(entries(*story[:count]))["anna"].state for count in range(1, len(story) + 1)]
    assert states == ["loading", "refused", "refused", "loading", "connected", "away"]
    assert client_statuses(entries(*story[:2]))["anna"].error == "expected the base ab; got cd"


def test_an_error_that_is_over_is_not_shown_any_more() -> None:
    lost: tuple[str, dict[str, Any]] = ("lost", {"client": "anna", "round": 1, "reason": "no sign of life for 600 s"})
    unused: tuple[str, dict[str, Any]] = ("unused", {"client": "anna", "round": 1, "reason": "late"})
    hello, connected = ("hello", {"client": "anna"}), ("connected", {"client": "anna", "examples": 3})
    used: tuple[str, dict[str, Any]] = ("used", {"client": "anna", "round": 2})

    def error(*events: tuple[str, dict[str, Any]]) -> str:
        return client_statuses(entries(*events))["anna"].error

    assert error(connected, lost) == error(connected, lost, hello) == "round 1: no sign of life for 600 s"
    assert error(connected, lost, hello, connected) == ""
    assert error(connected, unused) == "round 1: late"
    assert error(connected, unused, used) == ""


def test_a_site_that_knows_of_the_end_has_gone() -> None:
    story = entries(("connected", {"client": "anna", "examples": 3}), ("informed", {"client": "anna"}))
    assert client_statuses(story)["anna"].state == "away"


def test_after_a_restart_of_the_server_the_clients_have_to_come_again() -> None:
    result = client_statuses(
        entries(("connected", {"client": "anna", "examples": 3}), ("enrolled", {"clients": "anna bob"}))
    )
    assert (result["anna"].state, result["bob"].state) == ("away", "never seen")


@pytest.mark.parametrize(
    ("server", "holder", "finished", "opened", "text"),
    [
        ("7", None, False, None, "waiting for sites, process 7"),
        ("7", "7", False, 2, "running, in round 2, process 7"),
        ("7", None, True, None, "finished after round 1, telling the sites, process 7"),
        (None, None, True, None, "finished after round 1"),
        (None, None, False, 2, "stopped, in round 2"),
        (None, None, False, None, "stopped"),
    ],
)
def test_a_run_is_said_to_be_what_its_processes_do(
    server: str | None, holder: str | None, finished: bool, opened: int | None, text: str
) -> None:
    run = Status("", {}, True, 1, "", opened, (), 1, finished, holder, 0)
    shown = ServerStatus(Path("run"), run, [ClientStatus("a", state="never seen")], "", server=server, rounds=3)
    assert shown.state == text
    assert (shown.lines["rounds"], shown.lines["sites"]) == ("1 of 3", "1 never seen")


def test_how_long_ago_is_shown_in_one_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.deployment.status.time.time", lambda: 1_000_000.0)
    assert ClientStatus("a", state="connected", seen_ms=1000).seen == "now"
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


def test_scores_that_a_site_keeps_are_no_error() -> None:
    kept = {"client": "anna", "round": 1, "veto": "SCORES_NOT_ALLOWED", "reason": "policy.scores: kept"}
    other = {"client": "anna", "round": 2, "veto": "OPERATOR", "reason": "no"}
    connected: tuple[str, dict[str, Any]] = ("connected", {"client": "anna", "examples": 3})
    assert client_statuses(entries(connected, ("declined", kept)))["anna"].error == ""
    assert client_statuses(entries(connected, ("declined", other)))["anna"].error == "round 2: no"
