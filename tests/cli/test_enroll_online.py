"""A site that enrols with one command: the commands of its three parties, as many as each needs, and what they say."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.config.link import bind_server
from fedtune.deployment.enrolment import find_place, serving
from fedtune.link.pki.roster import RosterFile
from tests.link.ceremony import enroll_parties
from tests.link.federation import free_port


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    places = enroll_parties(tmp_path, clients=())
    text = f'[link]\nidentity = "{places["server"]}"\n[enrolment]\nlisten = "127.0.0.1:{free_port()}"\n'
    (tmp_path / "server.toml").write_text(text)
    return tmp_path


def run(*words: str, status: int = 0, pasted: str | None = None) -> str:
    result = CliRunner().invoke(app, list(words), input=pasted)
    assert result.exit_code == status, result.output
    return result.output


@contextmanager
def served() -> Iterator[None]:
    place = find_place(*bind_server(Path("server.toml")))
    roster = RosterFile(place.identity.folder / "roster", place.identity.root)
    with serving(place, roster, lambda kind, **fields: None) as desk:
        yield
        desk.look()


def carry(source: str, target: str) -> None:
    shutil.copytree(source, target, dirs_exist_ok=True)


def test_one_command_at_the_site_one_at_the_coordinator_and_one_at_the_ca(folder: Path) -> None:
    invited = run("enroll", "invite", "--name", "site-a", "--org", "hospital-a", "--config", "server.toml")
    code = invited.splitlines()[-1]
    assert "for one use, until" in invited
    assert "site-a, client of hospital-a: invited" in run("enroll", "queue", "--config", "server.toml")
    with served():
        waits = run("enroll", "--code", code, "--identity", "a", "--no-wait", status=75)
        assert "not signed yet; the same command asks again" in waits
        listed = run("enroll", "queue", "--config", "server.toml")
        fingerprint = re.search(r"voice with the person who signs: (.*)", waits)
        assert fingerprint
        assert fingerprint[1] in listed
        assert "next: carry" in listed
        carry("enrolment/queue", "stick")
        left = run("enroll", "sign", "stick")
        assert "site-a: left: its fingerprint was not confirmed" in left
        assert "or --yes for all" in left
        signed = run("enroll", "sign", "stick", "--fingerprint", fingerprint[1])
        assert "1 enrolled; the roster has version" in signed
        carry("stick", "enrolment/queue")
    with served():
        done = run("enroll", "--code", "-", "--identity", "a", pasted=f"{code}\n")
    assert "site-a of hospital-a is enrolled as client in care, until" in done
    assert "next: fedtune site init --server localhost:9000" in done
    assert "answered; came" in run("enroll", "queue", "--config", "server.toml")


def test_the_queue_is_json_for_a_program_and_may_be_empty(folder: Path) -> None:
    assert "no request waits, and no code is open" in run("enroll", "queue", "--config", "server.toml")
    run("enroll", "invite", "--name", "site-a", "--org", "a", "--config", "server.toml", "--hours", "2")
    shown = json.loads(run("enroll", "queue", "--config", "server.toml", "--json"))
    (row,) = shown["requests"]
    assert (row["name"], row["state"], row["role"]) == ("site-a", "invited", "client")
    assert 7000 < row["seconds"] <= 7200


def test_a_bad_file_in_a_carried_queue_is_named_and_the_command_fails(folder: Path) -> None:
    (folder / "stick").mkdir()
    (folder / "stick" / "eve.request.json").symlink_to(folder / "ca" / "ca.key")
    result = run("enroll", "sign", "stick", "--yes", status=1)
    assert "eve.request.json: left out: expected a regular file" in result
    assert "1 failed" in result


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["enroll", "--code", "fedtune.bundle.1.a.b"], "a bundle goes to the device"),
        (["enroll", "--code", "none.txt"], "fedtune enroll invite"),
        (["enroll", "invite", "--name", "a/b", "--org", "a", "--config", "server.toml"], "--name: expected letters"),
        (["enroll", "queue", "--config", "none.toml"], "a server file in TOML"),
        (["enroll", "serve", "--config", "server.toml", "--log", "xml"], "expected text or json"),
        (["enroll", "sign", "none"], "it is made by fedtune enroll request"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], says: str) -> None:
    assert says in run(*words, status=2)


def test_the_group_alone_shows_its_commands() -> None:
    shown = run("enroll", status=2)
    assert all(word in shown for word in ("invite", "queue", "serve", "request", "--code"))


def test_a_coordinator_gets_a_registrar_by_one_command_on_either_side(folder: Path) -> None:
    asked = run("enroll", "delegate", "--config", "server.toml")
    assert "next: carry" in asked
    carry("enrolment/queue", "stick")
    assert "fedtune ca delegate stick" in run("enroll", "sign", "stick")
    given = run("ca", "delegate", "stick", "--days", "7")
    assert "server may renew clients and roster until" in given
    assert "releases before 0.3 do not read" in given
    carry("stick", "enrolment/queue")
    with served():
        pass
    listed = run("roster", "list", "--identity", "server/identity")
    assert "a registrar may renew clients and this roster until" in listed
    assert json.loads(run("roster", "list", "--identity", "server/identity", "--json"))["version"] == 1_000_000
    assert "no registrar any more" in run("ca", "delegate", "--end")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["ca", "delegate"], "expected the folder of a queue, or --end"),
        (["ca", "delegate", "none"], "it is made by fedtune enroll delegate"),
        (["ca", "delegate", "server.toml"], "registrar: "),
        (["ca", "delegate", "server.toml", "--days", "93"], "93"),
    ],
)
def test_mistakes_about_a_registrar_are_one_sentence(words: list[str], says: str) -> None:
    assert says in run(*words, status=2)
