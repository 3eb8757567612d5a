from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedtune.cli.main import app
from fedtune.runs.plan import plan

YAML = """
use_gpu: False
early_stop: {patience: 0}
federate: {mode: standalone, client_num: 3, total_round_num: 2, online_aggr: False, save_to: x.ckpt}
data: {root: data/, type: 'gsm8k@llm', splits: [0.9, 0.05, 0.05], splitter: 'iid'}
llm:
  tok_len: 400
  adapter: {use: True, args: [{adapter_package: peft, adapter_method: lora, r: 4, lora_alpha: 8}]}
dataloader: {batch_size: 1}
model: {type: 'some/llama@huggingface_llm'}
train: {local_update_steps: 3, batch_or_epoch: batch, optimizer: {lr: 5e-3}}
traim: {steps: 3}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(YAML)
    return path


def test_a_configuration_becomes_a_recipe_that_can_be_planned(config: Path, stories: Path, tmp_path: Path) -> None:
    rows = [{"question": f"what is {row}", "answer": f"it is {row}"} for row in range(30)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "recipe.toml"
    options = ["--base", str(stories), "--data", str(tmp_path / "rows.jsonl"), "-o", str(out)]
    result = CliRunner().invoke(app, ["import-fs", str(config), *options])
    assert (result.exit_code, result.stdout) == (0, f"{out}\n")
    assert result.stderr.startswith("23 keys: 15 read, 7 without a counterpart, 1 unknown\n")
    assert "train.optimizer.lr" not in result.stderr  # of what was read only the number: the lines are in the recipe
    assert "federate.save_to: no counterpart (the adapter is written after every round" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("traim.steps: unknown (no key of FederatedScope-LLM")
    planned = plan(out)
    assert [own["train"] + own["held_out"] for own in planned.split["clients"].values()] == [10, 10, 10]
    again = CliRunner().invoke(app, ["import-fs", str(config), "-o", str(out)])
    assert again.exit_code == 2
    assert "--out: expected a new file" in again.stderr


def test_every_key_is_in_the_json_and_the_recipe_on_stdout(config: Path) -> None:
    content = json.loads(CliRunner().invoke(app, ["import-fs", str(config), "--json"]).stdout)
    assert {entry["key"]: entry["known"] for entry in content["keys"]}["traim.steps"] is False
    assert len(content["keys"]) == 23
    assert CliRunner().invoke(app, ["import-fs", str(config)]).stdout == content["recipe"]


def test_a_recipe_that_would_not_bind_is_not_written(config: Path, tmp_path: Path) -> None:
    config.write_text(YAML.replace("total_round_num: 2", "total_round_num: 0"))
    result = CliRunner().invoke(app, ["import-fs", str(config), "-o", str(tmp_path / "r.toml")])
    assert result.exit_code == 2
    assert "rounds.count: expected a whole number of at least 1; got 0" in result.stderr
    assert not (tmp_path / "r.toml").exists()
