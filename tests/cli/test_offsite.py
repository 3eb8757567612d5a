"""`fedtune export` for offsite tuning, as a user types it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from tests.conftest import Simulated
from tests.runs.offsite import Tables, deep_base, over, public_text

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def deep(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return deep_base(tmp_path_factory.mktemp("deep"), checkpoints["llama"])


def test_an_emulator_is_exported_tuned_and_plugged_back(
    deep: Path, simulated: Simulated, tables: Tables, tmp_path: Path
) -> None:
    text, out = public_text(tmp_path / "public.jsonl"), tmp_path / "emulator"
    options = ["--form", "emulator", "--out", str(out), "--drop", "0.5", "--distill", str(text), "--steps", "2"]
    result = RUNNER.invoke(app, ["export", str(deep), *options, "--batch", "2", "--learning-rate", "1e-3"])
    assert result.exit_code == 0, result.output
    first, second = result.stdout.splitlines()
    assert first.startswith(f"{out}: blocks 0, 1, 4, 5 of 6, ")
    assert second.startswith('recipes for it: base = this folder, adapter.layers = "ends"; digest ')
    assert "distilled 2 of 2 steps: relative error of the middle " in result.stderr
    run = simulated(over(tables, out, "ends"), tmp_path / "run").path
    result = RUNNER.invoke(app, ["export", str(run), "--plug-back", str(deep), "--out", str(tmp_path / "adapter")])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert [line[:15].strip() for line in lines[:-1]] == ["zero-shot", "emulator tuned", "plug-back"]
    assert all(line[15:].startswith(" loss ") for line in lines[:-1])
    assert lines[-1] == str(tmp_path / "adapter")


def test_a_warning_where_the_emulator_gives_the_model_away(
    deep: Path, simulated: Simulated, tables: Tables, tmp_path: Path
) -> None:
    out = tmp_path / "emulator"
    assert (
        RUNNER.invoke(app, ["export", str(deep), "--form", "emulator", "--out", str(out), "--drop", "0"]).exit_code == 0
    )
    run = simulated(over(tables, out, "ends"), tmp_path / "run").path
    result = RUNNER.invoke(app, ["export", str(run), "--plug-back", str(deep)])
    assert result.exit_code == 0, result.output
    assert "it gives the model away" in result.stderr
    assert "gives the model away" not in result.stdout


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--front", "1"], "expected --form emulator"),
        (["--distill", "x"], "expected --form emulator"),
        (["--form", "emulator", "--out", "x", "--steps", "3"], "expected --distill FILE"),
        (["--form", "emulator", "--out", "x", "--codes", "nf4"], "expected --kind quantise"),
        (["--form", "emulator", "--out", "x", "--kind", "quantise", "--drop", "0.5"], "keeps every block"),
        (["--form", "emulator"], "expected a folder"),
        (["--form", "emulator", "--out", "x", "--max-rank", "4"], "expected none with --form emulator"),
        (["--form", "emulator", "--out", "x", "--plug-back", "y"], "expected none with --form emulator"),
        (["--full", "x"], "expected --plug-back BASE"),
        (["--no-scores"], "expected --plug-back BASE"),
        (["--plug-back", "x", "--deploy"], "expected no --plug-back"),
        (["--plug-back", "x", "--edge", "y"], "expected no --plug-back"),
    ],
)
def test_options_that_need_or_exclude_each_other(options: Sequence[str], words: str, tmp_path: Path) -> None:
    result = RUNNER.invoke(app, ["export", str(tmp_path), *options], env={"COLUMNS": "200"})
    assert result.exit_code == 2, result.output
    assert words in result.output


def test_an_emulator_of_no_middle_ends_with_status_2(deep: Path, tmp_path: Path) -> None:
    options = ["--form", "emulator", "--out", str(tmp_path / "x"), "--front", "3", "--back", "3"]
    result = RUNNER.invoke(app, ["export", str(deep), *options])
    assert (result.exit_code, result.stderr.count("fedtune: ")) == (2, 1)
    assert not (tmp_path / "x").exists()
