"""The command `fedtune-edge enroll`: from nothing to a device that can join, by pasted lines alone."""

from __future__ import annotations

import io
import re
import sys
import time
from pathlib import Path

import pytest

from fedtune.cli.edge import main
from fedtune.cli.edge_options import DONE, RETRY, USAGE
from fedtune.link.pki import authority, codes, enrollment, invitations
from fedtune.link.pki.signing import fingerprint
from tests.link.enrolment_office import enrolment_office

NOW = int(time.time())


@pytest.fixture
def ca(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "device").mkdir()
    monkeypatch.chdir(tmp_path / "device")
    monkeypatch.setattr(sys, "stdin", io.StringIO())  # nobody sits there: nothing may wait for an answer
    authority.create_authority(tmp_path / "ca", "care", now=NOW)
    return tmp_path / "ca"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(capsys: pytest.CaptureFixture[str], *words: str, status: int = DONE) -> str:
    assert main(["enroll", *words]) == status
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    assert status == DONE or len(shown.err.splitlines()) == 1
    return shown.out + shown.err


def code_in(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("fedtune."))


def signed(ca: Path, text: str) -> str:
    """Do what the operator does with a pasted line."""
    data = codes.decode("request", text)
    return codes.encode("bundle", authority.sign_request(ca, data, now=NOW))


def test_from_nothing_to_a_device_that_can_join(ca: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = run(capsys, "--name", "kitchen")
    data = codes.decode("request", code_in(asked))
    assert enrollment.read_request(data).org == "kitchen"
    assert f"to read out to the operator: {fingerprint(data)}" in asked
    assert Path("kitchen.request.json").read_bytes() == data
    done = run(capsys, signed(ca, asked), "--server", "fl.example.org", "--data", "notes.txt")
    assert "kitchen is enrolled in care, until" in done
    anchors = fingerprint((ca / "ca.crt").read_bytes() + Path("identity/root.pub").read_bytes())
    assert f"fingerprint of the federation: {anchors}" in done
    assert f"fingerprint of this device:    {fingerprint(data)}" in done
    assert re.findall(r"still missing: (\S+):", done) == ["model.base", "data.source"]
    assert 'address = "fl.example.org:9000"' in Path("site.toml").read_text()
    # A second one with the same line is a renewal, and changes nothing of the file.
    before = Path("site.toml").read_bytes()
    run(capsys, signed(ca, asked), "--server", "elsewhere")
    assert Path("site.toml").read_bytes() == before


def test_a_name_is_kept_and_none_is_asked_for_without_a_terminal(ca: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = run(capsys), run(capsys)
    name = first.partition(":")[0]
    assert second.startswith(f"{name}: ")
    assert fingerprint(codes.decode("request", code_in(second))) in second
    assert len(list(Path().glob("*.request.json"))) == 1


def test_a_code_may_be_split_by_the_shell_pasted_or_a_file(
    ca: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = signed(ca, run(capsys, "--name", "kitchen"))
    run(capsys, code[:50], code[50:300], code[300:])
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"here it is:\n{code[:80]}\n> {code[80:]}\n"))
    run(capsys, "-")
    Path("b.json").write_bytes(codes.decode("bundle", code))
    run(capsys, "b.json")


@pytest.mark.guarantee("G6")
def test_what_was_not_meant_for_this_device_is_one_line_each(ca: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = run(capsys, "--name", "kitchen")
    code = signed(ca, asked)
    garden = signed(ca, run(capsys, "--name", "garden", "--identity", "other"))
    for wrong, words in (
        (code[: len(code) // 2], "characters; copy the whole of it"),
        (code[200:], "in which none begins with fedtune.bundle."),
        (code_in(asked), "a request goes to the operator"),
        (code[:300] + ("a" if code[300] != "a" else "b") + code[301:], "its check does not hold"),
        (garden, "one of another, 'garden'"),
        ("nowhere.json", "it is made by fedtune enroll sign"),
    ):
        assert words in run(capsys, wrong, status=USAGE)
        assert not Path("identity/tls.crt").exists()
        assert not Path("site.toml").exists()
    assert "fedtune-edge enroll first" in run(capsys, code, "--identity", "nothing", status=USAGE)


@pytest.mark.guarantee("G6")
def test_another_federation_than_the_one_read_out_installs_nothing(
    ca: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code = signed(ca, run(capsys, "--name", "kitchen"))
    assert "the code was changed on its way" in run(capsys, code, "--fingerprint", "0000 " * 8, status=USAGE)
    monkeypatch.setattr(sys, "stdin", Terminal("no\n"))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main(["enroll", code]) == USAGE
    assert "nothing was changed; ask them" in capsys.readouterr().err
    assert not Path("identity/tls.crt").exists()
    monkeypatch.setattr(sys, "stdin", Terminal("yes\nfl.example.org:9443\n"))
    assert main(["enroll", code]) == DONE
    assert 'address = "fl.example.org:9443"' in Path("site.toml").read_text()


def test_names_that_cannot_be_enrolled_are_refused_before_keys_are_made(
    ca: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "--name: expected letters, digits" in run(capsys, "--name", "a b", status=USAGE)
    assert "--org: expected letters, digits" in run(capsys, "--name", "a", "--org", "/", status=USAGE)
    assert not Path("identity").exists()


def test_an_invitation_enrols_a_device_with_one_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "device").mkdir()
    monkeypatch.chdir(tmp_path / "device")
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with enrolment_office(tmp_path / "office") as office:
        line = invitations.encode(office.invite("kitchen", "home"))
        assert main(["enroll", line, "--no-wait"]) == RETRY
        waits = capsys.readouterr().err
        assert "fingerprint, to compare by voice with the person who signs" in waits
        assert "not signed yet; the same command asks again" in waits
        assert office.sign() == ["enrolled"]
        Path("code.txt").write_text(f"here it is:\n> {line[:99]}\n> {line[99:]}\n")
        assert main(["enroll", "code.txt"]) == DONE
    shown = capsys.readouterr().out
    assert "kitchen of home is enrolled as client in care" in shown
    assert "wrote site.toml" in shown
    assert 'address = "localhost:9000"' in Path("site.toml").read_text()
