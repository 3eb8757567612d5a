from __future__ import annotations

from pathlib import Path

import pytest

from fedtune.api import Run
from fedtune.errors import StoreError
from fedtune.tracking.facts import MOST_CHARACTERS, parameters, tags
from tests.report.conftest import WriteRun

RECIPE = """
name = "ward"
seed = 3
[model]
base = "/srv/bases/tiny-llama"
[client]
learning_rate = 3e-4
steps = 10
[adapter]
targets = ["q_proj", "v_proj"]
[data]
source = ["/srv/notes/st-anna.jsonl", "/srv/notes/st-georg.jsonl"]
split = { kind = "files", only = ["st-anna"] }
[evaluate]
prompt = "LONG"
[[override]]
clients = ["st-anna"]
rank = 4
"""


def test_settings_are_flat_and_name_no_client_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("LONG", "x" * 999))
    flat = parameters(tmp_path)
    assert flat["client.learning_rate"] == 3e-4
    assert flat["adapter.targets"] == "q_proj, v_proj"
    assert flat["model.base"] == "tiny-llama"
    assert flat["data.source.count"] == 2
    assert flat["override.count"] == flat["data.split.only.count"] == 1
    assert flat["evaluate.prompt"] == "x" * MOST_CHARACTERS
    assert "anna" not in str(flat)
    assert "srv" not in str(flat)


@pytest.mark.parametrize("content", [b"name = ", b"\xff\xfe"])
def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path, content: bytes) -> None:
    assert parameters(tmp_path) == {}
    (tmp_path / "recipe.toml").write_bytes(content)
    with pytest.raises(StoreError, match=r"recipe\.toml: expected (TOML|UTF-8)"):
        parameters(tmp_path)


def test_tags_are_of_the_run_and_without_a_summary_of_this_machine(write_run: WriteRun) -> None:
    run = write_run()
    assert tags(run)["fedtune.base_digest"].startswith("9f3c2b7d")
    assert tags(run)["fedtune.version.torch"] == "2.13.0"
    (run / "summary.json").write_text("[[[")
    assert set(tags(run)) >= {"fedtune.version.torch"}
    assert "fedtune.base_digest" not in tags(run)


def test_a_run_in_progress_has_its_base_from_the_journal(ran: Run) -> None:
    before = tags(ran.path)["fedtune.base_digest"]
    (ran.path / "summary.json").unlink()
    assert tags(ran.path)["fedtune.base_digest"] == before
