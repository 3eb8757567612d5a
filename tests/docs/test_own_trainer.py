"""The tutorial on Trainers of one's own: its code runs, and adds as few lines to a stock script as it says."""

from __future__ import annotations

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.client.conftest import loaded
from tests.conftest import ROOT
from tests.deployment.test_patch import Q, orders_for, scripted_join
from tests.model.conftest import Loader

__all__ = ["loaded"]
# PEFT and trl read names of transformers that are to go.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning",
    "ignore:.*is deprecated:DeprecationWarning",
    "ignore:.*pin_memory.*:UserWarning",
)
PAGE = ROOT / "docs" / "tutorials" / "own-trainer.md"
STOCK = """\
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments
)
import fedtune

tokenizer = AutoTokenizer.from_pretrained("base")
config = LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
trainer = Trainer(
    model=get_peft_model(AutoModelForCausalLM.from_pretrained("base"), config),
    args=TrainingArguments("out", learning_rate=1e-4, per_device_train_batch_size=4, report_to="none"),
    train_dataset=load_dataset("json", data_files="train.jsonl", split="train").map(lambda row: tokenizer(row["text"])),
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    processing_class=tokenizer,
)
fedtune.patch(trainer, site="site.toml")
trainer.train()
trainer.save_model("out/final")
"""
"""The tutorial's script with the Trainer of transformers, which is always installed."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def script() -> str:
    return next(block for block in blocks("python") if "SFTTrainer" in block)


def test_a_stock_script_takes_part_with_three_lines_at_most() -> None:
    for code in (script(), STOCK):
        assert 1 <= len([line for line in code.splitlines() if "fedtune" in line]) <= 3


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_the_script_of_the_tutorial_takes_part(
    kind: str, checkpoints: dict[str, Path], loaded: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "trl" and find_spec("trl") is None:
        pytest.skip("needs trl: pip install --no-deps trl")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(checkpoints["llama"])
    rows = [json.dumps({"text": f"the quick brown fox jumps over {number} dogs"}) for number in range(6)]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    site = next(block for block in blocks("toml") if "hospital-a" in block).replace("hospital-a", "ann")
    (tmp_path / "site.toml").write_text(f"{site}\n[policy]\nmin_examples = 1\n")
    # trl trains in bfloat16 on a GPU, if it is asked for nothing else; the test's machine may have none.
    plain = '"out", bf16=False, use_cpu=True, report_to="none", learning_rate'
    code = STOCK if kind == "transformers" else script().replace('"out", learning_rate', plain)
    scope: dict[str, Any] = {}
    with scripted_join(monkeypatch, orders_for(loaded("llama").digest)[:2], tmp_path) as updates:
        exec(compile(code, "script.py", "exec"), scope)
    assert [update.lora.tensors[f"{Q}.a"].shape[0] for update in updates] == [4, 2]
    assert (tmp_path / "out" / "final" / "adapter_config.json").is_file()


def test_the_function_of_the_tutorial_trains_in_a_simulation(
    tables: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shorter = {**tables, "rounds": {"count": 1}, "evaluate": {"every": 0, "clients": False}}
    (tmp_path / "recipe.json").write_text(json.dumps(shorter))
    code = next(block for block in blocks("python") if "trainer=train)" in block)
    code = code.replace('"recipe.toml"', "recipe, watch=lambda event: None")
    scope: dict[str, Any] = {"recipe": shorter}
    exec(compile(code, "train.py", "exec"), scope)
    assert [row["clients"] for row in scope["run"].rounds] == [0, 3]
