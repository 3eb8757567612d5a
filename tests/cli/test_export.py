"""`fedtune export` from the command line: its options, and bundles."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner

from fedtune.cli.main import app

RUNNER = CliRunner()


def test_a_bundle_and_its_sizes(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    result = RUNNER.invoke(app, ["export", str(checkpoints["llama"]), "--edge", str(out)])
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0].startswith(f"{out}: weights 0.1 MiB, graph 0.0 MiB, rest ")
    assert "losses within" in result.stdout
    assert "not signed: devices refuse it" in result.stdout
    assert "comparing its losses with torch's ..." in result.stderr
    again = RUNNER.invoke(app, ["export", str(checkpoints["llama"]), "--edge", str(out)])
    assert (again.exit_code, again.stderr.count("\n")) == (2, 1)
    assert "it holds files" in again.stderr


def test_options_that_exclude_each_other(tmp_path: Path) -> None:
    for arguments in (["--edge", "x", "--form", "peft"], ["--identity", "x"], ["--edge", "x", "--deploy"]):
        assert RUNNER.invoke(app, ["export", str(tmp_path), *arguments]).exit_code == 2
