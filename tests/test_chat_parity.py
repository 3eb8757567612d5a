"""A run on a chat model in a GGUF file against stock transformers and PEFT: prompts, losses, answers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedtune
from fedtune.model.gguf import convert_once
from fedtune.runs.demo import find_model
from tests.model.gguf_files import write_gguf

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
QUESTION = "What does the fox do?"
ROWS = [
    ("Where is the dog?", "In the sun, and it sleeps."),
    ("Who jumps?", "The quick brown fox."),
    ("What does the lazy dog do all day?", "It sleeps."),
    ("Name a fox.", "Reynard."),
]


def stock_loss(model: Any, tokenizer: Any, rows: list[tuple[str, str]]) -> float:
    """Return the mean loss of the answers' tokens, of rows that only stock transformers has touched."""
    total, count = 0.0, 0
    for question, answer in rows:
        turns = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
        lead = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
        ids = torch.tensor([tokenizer(whole, add_special_tokens=False)["input_ids"]])
        labels = ids.clone()
        labels[:, :lead] = -100
        with torch.inference_mode():
            total += model(input_ids=ids, labels=labels).loss.item() * (ids.shape[1] - lead)
        count += ids.shape[1] - lead
    return total / count


def check_against_stock(file: Path, folder: Path) -> None:
    """Run two clients of unequal ranks on a GGUF file, and compare scores and answers with stock PEFT's."""
    for client in ("ann", "bob"):
        lines = [{"instruction": f"{client}: {question}", "output": answer} for question, answer in ROWS]
        (folder / f"{client}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "test").write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in ROWS))
    run = fedtune.simulate(
        {
            "name": "parity",
            "model": {"base": str(file), "device": "cpu"},
            "adapter": {"rank": 2, "targets": ["q_proj", "v_proj"]},
            "method": {"name": "flora"},
            "client": {"steps": 2, "batch": 2, "learning_rate": 5e-3},
            "rounds": {"count": 2},
            "data": {
                "source": str(folder / "*.jsonl"),
                "test": str(folder / "test"),
                "format": "jsonl",
                "split": {"kind": "files"},
                "held_out": 0,
                "template": "auto",
                "max_tokens": 96,
            },
            "evaluate": {"every": 0, "new_tokens": 6, "prompts": [QUESTION]},
            "report": {"plots": False},
            "override": [{"clients": ["bob"], "rank": 4}],
        },
        out=folder / "run",
    )
    converted = convert_once(file)
    tokenizer = AutoTokenizer.from_pretrained(converted)
    model = AutoModelForCausalLM.from_pretrained(converted).eval()
    before = stock_loss(model, tokenizer, ROWS)
    assert math.isclose(run.summary["before"]["test"]["loss"], before, abs_tol=1e-4)
    tuned = PeftModel.from_pretrained(model, run.adapter).eval()
    assert math.isclose(run.summary["after"]["test"]["loss"], stock_loss(tuned, tokenizer, ROWS), abs_tol=1e-4)
    assert run.summary["after"]["test"]["loss"] < before - 0.01  # else an adapter of zeros would agree as well
    turns = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        out = tuned.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
    [sample] = run.summary["samples"]
    assert sample["after"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_tiny_chat_model_agrees_with_stock_peft(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_gguf(checkpoints["llama"], tmp_path / "tiny.gguf")
    check_against_stock(tmp_path / "tiny.gguf", tmp_path)


@pytest.mark.slow
def test_smollm2_agrees_with_stock_peft(smollm2: Path, tmp_path: Path) -> None:
    file = find_model()
    assert file is not None
    assert convert_once(file) == smollm2
    check_against_stock(file, tmp_path)
