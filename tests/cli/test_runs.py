from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from fedtune.cli.main import app
from tests.conftest import Simulated

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def command(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["runs", *map(str, arguments)])


@pytest.fixture
def ran(simulated: Simulated, tables: dict[str, Any], tmp_path: Path) -> Path:
    return simulated(tables, tmp_path / "runs" / "tiny").path


def test_runs_are_listed_with_what_became_of_them(ran: Path) -> None:
    for name in ("broken", "early"):
        (ran.parent / name).mkdir()
        (ran.parent / name / "recipe.toml").write_text("")
    (ran.parent / "broken" / "journal").write_bytes(bytes(range(200)))
    shown = command("list", ran.parent)
    assert shown.exit_code == 0
    assert "finished" in shown.stdout
    assert "damaged" in shown.stdout
    entries = {Path(entry["path"]).name: entry for entry in json.loads(command("list", ran.parent, "--json").stdout)}
    assert entries["tiny"]["committed"] == 2
    assert "journal, record" in entries["broken"]["damaged"]
    assert entries["early"]["in_words"] == "not begun"


def test_a_folder_without_runs_is_told(tmp_path: Path) -> None:
    assert "no runs in" in command("list", tmp_path).stdout


def test_the_status_says_where_a_run_stands(ran: Path) -> None:
    shown = command("status", ran)
    assert shown.exit_code == 0
    assert "finished" in shown.stdout
    assert json.loads((ran / "summary.json").read_text())["state_digest"] in shown.stdout


def test_a_whole_run_is_in_order(ran: Path) -> None:
    shown = command("verify", ran)
    assert shown.exit_code == 0, shown.output
    assert "2 rounds" in shown.stdout
    assert json.loads(command("verify", ran, "--json").stdout)["committed"] == 2


def flip(path: Path, at: int = -10) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_bit_is_named_wherever_it_is(ran: Path) -> None:
    (blob,) = [path for path in (ran / "blobs").rglob("*") if path.is_file()]
    flip(blob)
    refused = command("verify", ran)
    assert refused.exit_code == 2
    assert "state of round 2" in refused.stderr
    flip(blob)
    flip(ran / "adapter" / "adapter_model.safetensors")
    message = command("verify", ran).stderr
    assert "adapter_model.safetensors: expected the digest" in message
    assert f"this writes it again: fedtune simulate --resume {ran}" in message
    flip(ran / "adapter" / "adapter_model.safetensors")
    lines = (ran / "rounds.jsonl").read_text()
    digest = json.loads(lines.splitlines()[1])["state_digest"]
    (ran / "rounds.jsonl").write_text(lines.replace(digest, 64 * "0"))
    assert "expected round 1 with the state" in command("verify", ran).stderr
    (ran / "rounds.jsonl").write_text(lines)
    flip(ran / "journal", 100)
    assert "journal, record" in command("verify", ran).stderr


@pytest.mark.parametrize("verb", ["status", "verify"])
def test_what_is_no_run_is_refused(verb: str, tmp_path: Path) -> None:
    refused = command(verb, tmp_path)
    assert refused.exit_code == 2
    assert "expected a run directory" in refused.stderr


def test_a_folder_that_is_not_there_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = command("list", tmp_path / "nope")
    assert refused.exit_code == 2
    assert "nope: expected a folder of run directories; got none" in refused.stderr
    monkeypatch.chdir(tmp_path)
    assert command("list").stdout == "no runs in runs\n"  # before the first run that is no mistake


def test_a_piped_table_has_no_blanks_at_the_ends_of_its_lines(ran: Path) -> None:
    lines = command("list", ran.parent).stdout.splitlines()
    assert len(lines) == 2
    assert [line.rstrip() for line in lines] == lines
