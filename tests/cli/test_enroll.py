"""The whole ceremony on the command line: CA, server, a site, a roster that changes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words: str, status: int = 0, pasted: str | None = None) -> str:
    result = CliRunner().invoke(app, list(words), input=pasted)
    assert result.exit_code == status, result.output
    return result.output


def read_out(output: str) -> str:
    match = re.search(r"fingerprint[^:]*: ((?:[0-9a-f]{4} ?){8})", output)
    assert match
    return match[1]


def test_a_site_is_enrolled_step_by_step_and_each_step_names_the_next() -> None:
    result = run("ca", "init", "ca", "--federation", "care")
    assert "next, at each party: fedtune enroll request" in result
    asked = run("enroll", "request", "--name", "site-a", "--org", "hospital-a")
    assert "next, at the CA: fedtune enroll sign site-a.request.json" in asked
    signed = run("enroll", "sign", "site-a.request.json", "--fingerprint", read_out(asked).upper())
    assert "fedtune.request." not in asked
    assert "fedtune.bundle." not in signed
    assert "site-a, client of hospital-a" in signed
    assert "next, at site-a: fedtune enroll accept site-a.bundle.json" in signed
    accepted = run("enroll", "accept", "site-a.bundle.json")
    assert "site-a of hospital-a is enrolled as client in care" in accepted
    assert read_out(accepted) == read_out(result)


def test_requests_and_bundles_travel_as_pasted_lines(folder: Path) -> None:
    run("ca", "init", "ca", "--federation", "care")
    asked = run("enroll", "request", "--name", "site-a", "--org", "o", "--code")
    code = asked.splitlines()[-1]
    (folder / "site-a.request.json").unlink()
    wrapped = f"[10:42] site-a:\n{code[:70]}\n> {code[70:]}\n"
    signed = run("enroll", "sign", "-", "--fingerprint", read_out(asked), pasted=wrapped)
    line = next(line for line in signed.splitlines() if line.startswith("fedtune.bundle."))
    assert "or send this line, and there: fedtune enroll accept CODE" in signed
    (folder / "site-a.bundle.json").unlink()
    assert "a bundle goes to the device" in run("enroll", "sign", line, status=2)
    assert "the first 100 of its" in run("enroll", "accept", line[:100], status=2)
    assert "is enrolled as client in care" in run("enroll", "accept", line)


def test_a_bundle_too_long_to_paste_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedtune.link.pki.codes.MAX_PASTED", 1500)
    run("ca", "init", "ca", "--federation", "care")
    asked = run("enroll", "request", "--name", "site-a", "--org", "o")
    signed = run("enroll", "sign", "site-a.request.json", "--fingerprint", read_out(asked), "--code")
    assert "send the file" in signed
    assert "fedtune.bundle." not in signed


def test_without_the_right_fingerprint_nothing_is_signed(folder: Path) -> None:
    run("ca", "init", "ca", "--federation", "care")
    run("enroll", "request", "--name", "site-a", "--org", "a")
    assert "compare it by voice first" in run("enroll", "sign", "site-a.request.json", status=2)
    wrong = run("enroll", "sign", "site-a.request.json", "--fingerprint", "0000 " * 8, status=2)
    assert "the request was changed on its way" in wrong
    assert not (folder / "site-a.bundle.json").exists()


def test_a_roster_is_listed_changed_and_installed(folder: Path) -> None:
    run("ca", "init", "ca", "--federation", "care")
    assert "no party is enrolled yet" in run("roster", "list", "--ca", "ca")
    for name, more in (("server", ["--role", "coordinator", "--host", "localhost"]), ("site-a", [])):
        asked = run("enroll", "request", "--name", name, "--org", "o", "--identity", f"{name}/identity", *more)
        run("enroll", "sign", f"{name}.request.json", "--fingerprint", read_out(asked))
        run("enroll", "accept", f"{name}.bundle.json", "--identity", f"{name}/identity")
    assert "site-a" in run("roster", "list", "--identity", "site-a/identity")
    assert "version 4" in run("roster", "revoke", "site-a")
    assert "active" in run("roster", "list", "--identity", "server/identity", "--json")
    assert "installed version 4" in run("roster", "install", "ca/roster", "--identity", "server/identity")
    assert '"state": "revoked"' in run("roster", "list", "--identity", "server/identity", "--json")
    assert "version 5" in run("roster", "renew", "--days", "90")
    again = run("roster", "install", "server/identity/roster", "--identity", "site-a/identity")
    assert "installed version 4" in again
    run("roster", "install", "ca/roster", "--identity", "site-a/identity")
    older = run("roster", "install", "server/identity/roster", "--identity", "site-a/identity", status=2)
    assert "expected version 5 or a later one" in older


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("ca", "init", "new", "--federation", "a b"), "federation"),
        (("enroll", "request", "--name", "a/b", "--org", "o"), "name"),
        (("enroll", "request", "--name", "a", "--org", "o", "--role", "coordinator"), "--host"),
        (("enroll", "sign", "none.json"), "made by fedtune enroll request"),
        (("enroll", "accept", "none.json"), "made by fedtune enroll sign"),
        (("roster", "list"), "fedtune enroll accept"),
        (("roster", "revoke", "a"), "fedtune ca init"),
        (("roster", "install", "none"), "a signed roster at none"),
    ],
)
def test_what_is_wrong_is_one_sentence(words: tuple[str, ...], text: str) -> None:
    output = run(*words, status=2)
    assert output.startswith("fedtune: ")
    assert text in output
    assert "Traceback" not in output


def test_request_overwrites_no_key_and_a_second_one_renews(folder: Path) -> None:
    run("ca", "init", "ca", "--federation", "care")
    keys = []
    for _ in range(2):
        asked = run("enroll", "request", "--name", "site-a", "--org", "o")
        run("enroll", "sign", "site-a.request.json", "--fingerprint", read_out(asked))
        run("enroll", "accept", "site-a.bundle.json")
        keys.append((folder / "identity" / "sign.key").read_bytes())
    assert keys[0] == keys[1]
    assert len(run("roster", "list").splitlines()[-1].split()) >= 9  # two serials
