from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.store import peft
from fedtune.store.run_journal import RunJournal
from fedtune.store.training_record import training_record
from tests.link.ceremony import enroll_parties
from tests.store.test_manifest import ADAPTER, FACTS
from tests.store.test_result import TARGET


def command(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def parties(tmp_path: Path) -> Mapping[str, Path]:
    return enroll_parties(tmp_path / "parties")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    with RunJournal.create(folder) as ledger:
        ledger.begin({"recipe": ""})
    peft.write(folder / "adapter", ADAPTER, {}, TARGET, {**FACTS, "training": training_record(folder)})
    return folder


def test_what_is_signed_is_verified_and_shown(run: Path, parties: Mapping[str, Path]) -> None:
    signed = command("sign", run / "adapter", "--identity", parties["server"])
    assert (signed.exit_code, signed.stdout) == (0, f"{run / 'adapter' / 'manifest.dsse'}\n"), signed.output
    verify = ("verify", run / "adapter", "--roster", parties["site-a"] / "roster", "--run", run)
    shown = command(*verify)
    assert shown.exit_code == 0, shown.output
    assert f"{run / 'adapter'}: 3 files as server (org-server) of care signed them on 20" in shown.stdout
    assert "roster version 4, root key " in shown.stdout
    facts = json.loads(command(*verify, "--json").stdout)
    assert (facts["signer"], facts["federation"], facts["files"]) == ("server", "care", 3)
    assert facts["predicate"]["base"] == FACTS["base"]


@pytest.mark.guarantee("G19")
def test_the_first_difference_is_one_sentence_and_the_exit_status_2(run: Path, parties: Mapping[str, Path]) -> None:
    command("sign", run / "adapter", "--identity", parties["server"])
    (run / "adapter" / "adapter_config.json").write_text("{}")
    refused = command("verify", run / "adapter", "--roster", parties["ca"] / "roster")
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"fedtune: {run / 'adapter' / 'adapter_config.json'}: expected the")
    assert len(refused.stderr.splitlines()) == 1
    resigned = command("sign", run / "adapter", "--identity", parties["server"])
    assert resigned.exit_code == 2


def test_a_site_signs_no_result(run: Path, parties: Mapping[str, Path]) -> None:
    refused = command("sign", run / "adapter", "--identity", parties["site-a"])
    assert refused.exit_code == 2
    assert "expected a coordinator" in refused.stderr


def test_another_run_s_journal_is_refused(run: Path, parties: Mapping[str, Path], tmp_path: Path) -> None:
    command("sign", run / "adapter", "--identity", parties["server"])
    (tmp_path / "other").mkdir()
    with RunJournal.create(tmp_path / "other") as ledger:
        ledger.begin({"recipe": "x"})
    refused = command("verify", run / "adapter", "--roster", parties["ca"] / "roster", "--run", tmp_path / "other")
    assert refused.exit_code == 2
    assert "the journal was cut or written anew, or is another run's" in refused.stderr
