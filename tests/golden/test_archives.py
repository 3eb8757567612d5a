"""Runs that 0.2.0 began go on here to the digests that they would have come to, or are refused by one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedtune
from fedtune.api import verify
from tests.golden import archives, recipes, record

RECORDED = json.loads((archives.HERE / "expected.json").read_text())
SAME_MACHINE = record.machine() == json.loads((record.HERE / "archives.json").read_text())["machine"]

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.mark.parametrize("name", sorted(archives.STOPPED))
def test_a_stopped_run_of_0_2_0_is_resumed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipes.write_data(tmp_path)
    run = archives.unpack(name, tmp_path)
    before = [json.loads(line)["state_digest"] for line in (run / "rounds.jsonl").read_text().splitlines()]
    assert before == RECORDED[name]["states"][: len(before)]
    resumed = archives.ended(fedtune.simulate(resume=run).path)
    assert resumed["state"] == "finished"
    assert resumed["states"][: len(before)] == before
    verify(run)
    if SAME_MACHINE:  # elsewhere torch may round otherwise
        assert resumed == RECORDED[name]
