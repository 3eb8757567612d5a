from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from fedtune.cli.main import app


def test_a_ca_is_made_once_and_its_folder_is_for_its_owner(tmp_path: Path) -> None:
    words = ["ca", "init", str(tmp_path / "ca"), "--federation", "care"]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert (tmp_path / "ca").stat().st_mode & 0o077 == 0
    before = (tmp_path / "ca" / "ca.key").read_bytes()
    again = CliRunner().invoke(app, words)
    assert again.exit_code == 2
    assert "new or an empty folder" in again.output
    assert (tmp_path / "ca" / "ca.key").read_bytes() == before


def test_help_names_the_command() -> None:
    assert "init" in CliRunner().invoke(app, ["ca", "--help"]).output
