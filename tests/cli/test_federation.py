"""The commands serve, join, status and audit, as a new user meets them; whole runs are in tests/test_link.py."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.errors import ConfigError, Fault, FedtuneError, StoreError, TemporaryError
from tests.deployment.test_coordinator import RECIPE
from tests.deployment.test_join import SITE as OWN
from tests.link.ceremony import enroll_parties
from tests.link.federation import federation
from tests.link.link_server import run_link_server
from tests.test_link import FLORA, SITE, SITES, scripted


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(words))
    return result.exit_code, result.output


@pytest.mark.parametrize("command", ["serve", "join", "status", "audit"])
def test_help_has_examples(command: str) -> None:
    status, output = run(command, "--help")
    assert status == 0
    assert f"fedtune {command}" in output


def test_a_server_without_an_identity_says_how_to_get_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    status, output = run("serve", "recipe.toml")
    assert status == 2
    assert "fedtune enroll request" in output
    assert run("serve")[0] == 2
    status, output = run("serve", "none.toml")
    assert status == 2
    assert "none.toml" in output
    assert not (tmp_path / "runs").exists()
    status, output = run("serve", "recipe.toml", "--set", "link.listn='x'", "--set", "rounds.count=2")
    assert status == 2
    assert "link.listn" in output
    assert run("serve", "--resume", "runs/x", "--fresh")[0] == 2


def test_a_dry_run_asks_a_server_and_leaves_nothing(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running:
        site = tmp_path / "site-a" / "site.toml"
        site.write_text(OWN.replace("localhost:1", f"localhost:{running.port}"))
        object.__setattr__(running.dispatcher.run, "recipe", RECIPE.encode())
        status, output = run("join", str(site), "--dry-run")
        assert status == 2  # the recipe of this server's plan was signed before it was changed
        assert "coordinator has signed" in output
    assert not (tmp_path / "site-a" / "state").exists()


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (StoreError("state: expected to write it; No space left on device"), 75),
        (TemporaryError(Fault("link.address", "a server that can be reached", "61 s without a connection")), 75),
        (StoreError("state: expected that no other process writes it"), 2),
        (ConfigError(Fault("name", "a name", "none")), 2),
    ],
)
def test_a_site_that_may_be_started_again_later_says_so_by_its_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: FedtuneError, status: int
) -> None:
    def fail(site: Path, **options: object) -> None:
        raise error from (OSError(errno.ENOSPC, "No space left on device") if "No space" in str(error) else None)

    monkeypatch.setattr("fedtune.deployment.join.join", fail)
    assert run("join", "site.toml") == (status, f"fedtune: {error}\n")


def test_a_dry_run_without_a_server_says_so(tmp_path: Path) -> None:
    enroll_parties(tmp_path)
    site = tmp_path / "site-a" / "site.toml"
    site.write_text(OWN)
    status, output = run("join", str(site), "--dry-run")
    assert status == 2
    assert "no server listens on localhost:1" in output


def test_status_and_audit_show_a_run_that_has_ended(tmp_path: Path) -> None:
    with federation(tmp_path, FLORA, SITES, site=dict.fromkeys(SITES, SITE)) as running:
        running.serve()
        scripted(running, *SITES, seconds=0.0)
        running.until(lambda: running.events("server", "listening"))
        site = str(running.folder / "site-b" / "site.toml")
        status, output = run("join", site, "--dry-run", "--json")
        shown = json.loads(output)
        assert status == 0
        assert (shown["demand"]["method"], shown["demand"]["rank"], shown["rounds"]) == ("flora", 4, 4)
        assert running.exit_statuses("server", *SITES) == [0] * 4
        status, output = run("status", str(running.run))
        assert status == 0
        assert "finished after round 4" in output
        again, output = run(
            "serve", "--resume", str(running.run), "--config", str(running.folder / "server.toml"), "--log", "json"
        )
        assert again == 0
        assert "finished after round 4" in output
        assert "complete" in output
        output = run("status", str(running.run))[1]
        assert "base        held-out loss " in output
        assert "now         held-out loss " in output
        for name in SITES:
            assert name in output
        events = json.loads(run("status", str(running.run), "--json")[1])
        assert [(one["name"], one["rounds"], one["error"]) for one in events["clients"]] == [
            (name, 4, "") for name in SITES
        ]
        status, output = run("audit", str(running.run), "--kind", "used")
        assert status == 0
        assert output.count(" used ") == 12
        head = output.rsplit(maxsplit=1)[-1]
        status, output = run("audit", str(running.run), "--kind", "foo")
        assert status == 2
        assert "--kind: expected a kind of event, in this log " in output
        assert run("audit", str(running.run), "--kind", "barred")[0] == 0  # one that did not happen
        sent = run("audit", str(running.folder / "site-a" / "state"), "--kind", "sending", "--json")[1]
        assert (
            len([one for one in map(json.loads, sent.splitlines()) if one["round"]]) == 9
        )  # updates, scores, and that the result came
        assert run("audit", str(running.run), "--head", head)[0] == 0
        assert run("audit", str(running.run), "--head", "ab" * 32)[0] == 2
        for name in SITES:
            state = str(running.folder / name / "state")
            assert run("audit", str(running.run), "--receipts", state)[1].startswith("4 receipts")
        assert run("audit", str(running.run), "--receipts", str(running.folder))[0] == 2
        journal = (running.run / "journal").read_bytes()
        (running.run / "journal").write_bytes(journal[: len(journal) // 2])
        status, output = run("audit", str(running.run), "--receipts", str(running.folder / "site-a" / "state"))
        assert status == 2
        assert "cut or written anew" in output
        (running.run / "journal").write_bytes(journal)
        log = running.run / "link" / "audit"
        entries = log.read_bytes()
        log.write_bytes(entries.replace(b"site-a", b"site-x", 1))
        status, output = run("audit", str(running.run))
        assert status == 2
        assert "damaged" in output
        status, output = run("runs", "verify", str(running.run))
        assert status == 2
        assert "damaged" in output
        log.write_bytes(entries)
        assert run("runs", "verify", str(running.run))[0] == 0


def test_a_site_that_wants_to_be_asked_says_so_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def join(site: Path, *, agree: Callable[[str], bool], **options: object) -> None:
        agree("a recipe")

    monkeypatch.setattr("fedtune.deployment.join.join", join)
    result = CliRunner().invoke(app, ["join", str(tmp_path / "site.toml")])
    assert result.exit_code == 2
    assert "policy.ask: expected your yes to the recipe; got no terminal to ask at" in result.stderr
    assert CliRunner().invoke(app, ["join", str(tmp_path / "site.toml"), "--yes"]).exit_code == 0
