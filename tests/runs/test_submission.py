"""A submission to the leaderboard: what its loader reads, its rules beside the run, and no path of this machine."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import fedtune
from fedtune import api
from fedtune.errors import ConfigError
from fedtune.model import embedded
from fedtune.rounds.record import RoundRecord
from fedtune.runs.plan import plan
from fedtune.runs.submission import (
    OLDEST_KEYS,
    Submission,
    last_part,
    page_text,
    project_text,
    public_recipe,
    rule_rows,
)

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
RECIPES = Path(__file__).parents[2] / "simulations" / "leaderboard-nlp"


def test_the_adapter_loads_as_the_run_s_own_and_has_no_key_that_the_oldest_loader_refuses(
    ran: api.Run, tables: dict[str, Any], tmp_path: Path
) -> None:
    folder = fedtune.export(ran.path, form="flowertune", out=tmp_path / "submission")
    (adapter,) = folder.glob("peft_*")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert set(config) <= OLDEST_KEYS
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (config["r"], config["r"], {})
    ids = torch.tensor([[5, 6, 7, 8]])

    def logits(of: Path) -> torch.Tensor:
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tables["model"]["base"]), of).eval()
        with torch.inference_mode():
            result: torch.Tensor = model(input_ids=ids).logits
        return result

    torch.testing.assert_close(logits(adapter), logits(ran.adapter), atol=1e-5, rtol=0)


def test_the_files_say_the_run_and_no_path_of_this_machine(ran: api.Run, tmp_path: Path) -> None:
    folder = fedtune.export(ran.path, form="flowertune", out=tmp_path / "submission")
    assert {path.name for path in folder.iterdir()} == {"README.md", "pyproject.toml", "recipe.toml", "peft_2"}
    texts = {path.name: path.read_text() for path in folder.rglob("*") if path.suffix in (".md", ".toml", ".json")}
    assert not [name for name, text in texts.items() if str(tmp_path.anchor) + "tmp" in text or str(ran.path) in text]
    project = tomllib.loads(texts["pyproject.toml"])["tool"]["flwr"]["app"]
    assert project["config"]["recipe"] == texts["recipe.toml"]
    assert project["config"]["num-server-rounds"] == ran.summary["rounds"]
    assert project["components"]["serverapp"] == "fedtune.cli.flower_server:app"
    assert fedtune.bind(project["config"]["recipe"]).name == fedtune.bind(ran.path / "recipe.toml").name
    page = texts["README.md"]
    sent = (ran.summary["bytes_down"] + ran.summary["bytes_up"]) / 2**20
    assert f"| communication | at most 200,000 MB | {sent:,.2f} MB | yes |" in page
    assert f"{ran.summary['after']['test']['loss']:.4f}" in page


def submission(recipe: str, *, sent: int, clients: int = 20) -> Submission:
    records = (RoundRecord(0, seconds=1.0), RoundRecord(200, seconds=1.0, bytes_down=sent // 2, bytes_up=sent // 2))
    return Submission(fedtune.bind(RECIPES / recipe), records, clients, {"state_digest": "ab"})


def test_the_recipes_of_the_leaderboard_keep_its_rules() -> None:
    for path in sorted(RECIPES.glob("*.toml")):
        rows = list(rule_rows(submission(path.name, sent=2**20)))
        kept = [row.endswith("| yes |") for row in rows]
        assert kept == [path.name != "leaderboard-local.toml", True, True, True], path.name


def test_what_breaks_a_rule_is_said() -> None:
    rows = list(rule_rows(submission("smollm2-135m.toml", sent=200_001 * 2**20, clients=10)))
    assert [row.endswith("| no |") for row in rows] == [False, True, False, True]
    assert "200,001.00 MB" in rows[-1]


def test_a_page_without_scores_says_so() -> None:
    page = page_text(submission("smollm2-135m.toml", sent=2**20), r=32)
    assert "| not scored | not scored | not scored | not scored | 1.00 MB |" in page
    assert "loss on its own test data" not in page
    assert page.startswith("---\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n")


def test_a_base_with_a_quote_in_its_name_leaves_a_project_file_that_can_be_read() -> None:
    known = submission("smollm2-135m.toml", sent=2**20)
    named = replace(known, recipe=replace(known.recipe, model=replace(known.recipe.model, base='a "b" \\c')))
    assert 'a "b" \\c' in tomllib.loads(project_text(named))["project"]["description"]


def test_local_folders_are_named_by_their_last_part() -> None:
    recipe = fedtune.bind(RECIPES / "smollm2-135m.toml")
    assert public_recipe(recipe) == recipe
    local = replace(recipe, data=replace(recipe.data, source=("/a/b/x.jsonl", "y.jsonl"), test="/c/t.jsonl"))
    assert (public_recipe(local).data.source, public_recipe(local).data.test) == (("x.jsonl", "y.jsonl"), "t.jsonl")
    assert last_part("org/name") == "org/name"


def test_a_run_of_seeds_is_refused(seeded: api.Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a run of adapters"):
        fedtune.export(seeded.path, form="flowertune", out=tmp_path / "submission")
    assert not (tmp_path / "submission").exists()


SIZES: dict[str, tuple[float, dict[str, Any]]] = {
    "llama-3.2-3b.toml": (27.4, {"model_type": "llama", "hidden_size": 3072, "num_hidden_layers": 28, "head_dim": 128}),
    "mistral-7b.toml": (40.7, {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "head_dim": 128}),
}
"""By recipe, what the leaderboard says that its baseline of this base has sent (GB of 1,024 MB, flower.ai, read
2026-11-30), and the shape of the base by its config.json."""


@pytest.mark.parametrize("name", SIZES)
def test_a_plan_without_weights_finds_the_bytes_of_the_leaderboards_baseline(name: str, tmp_path: Path) -> None:
    published, shape = SIZES[name]
    heads = {"num_attention_heads": shape["hidden_size"] // 128, "num_key_value_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps({**shape, **heads, "intermediate_size": 8192, "vocab_size": 4096}))
    for file in embedded.path().glob("tokenizer*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tables = tomllib.loads((RECIPES / name).read_text())
    data = {key: value for key, value in tables["data"].items() if key not in ("source", "split")}
    # Data at sites: the twenty parts cannot be counted here, so a round's two clients are a number.
    rounds = {"count": 1, "cohort": 2}
    planned = plan({**tables, "model": {"base": str(tmp_path), "dtype": "nf4"}, "data": data, "rounds": rounds})
    assert planned.bill is not None
    # The leaderboard rounds up to a tenth.
    assert 0 <= published - tables["rounds"]["count"] * sum(planned.bill.traffic) / 2**30 < 0.1
