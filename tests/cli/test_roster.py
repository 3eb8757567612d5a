"""What the table of a roster shows; the commands that change one are in test_enroll.py."""

from __future__ import annotations

import time
from pathlib import Path

from typer.testing import CliRunner

from fedtune.cli.main import app
from tests.link.ceremony import enroll_parties


def test_an_expired_roster_says_so(tmp_path: Path) -> None:
    places = enroll_parties(tmp_path, now=int(time.time()) - 40 * 86_400)
    output = CliRunner().invoke(app, ["roster", "list", "--identity", str(places["site-a"])]).output
    assert "EXPIRED" in output.splitlines()[0]
    assert {line.split()[0] for line in output.splitlines()[2:]} == {"server", "site-a", "site-b"}
