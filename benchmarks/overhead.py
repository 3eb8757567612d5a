"""The same local steps through fedtune's rounds and in a bare PyTorch and peft loop, in turn, in one run.

    python benchmarks/overhead.py [--base FOLDER] [--threads 1]

The bare loop is what one would write by hand: one peft model, one AdamW, the same batches of the same examples. Beside
it stand fedtune's rounds over several clients, with everything between the steps: adapters attached and removed,
messages encoded and decoded, updates admitted and aggregated. Scoring and loading are left out of both. Prints one
JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedtune.config import bind
from fedtune.model.libraries import quiet, threads
from fedtune.runs.demo_code import write_data
from fedtune.runs.local import Experiment, in_process, prepare, run_context
from fedtune.runs.runner import run_rounds_of

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="embedded", help="folder of a causal model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="of each of eight clients in each of two rounds")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, threads(args.threads):
        write_data(Path(folder) / "data")
        experiment = prepare(bind(recipe(folder, args.base, steps=args.steps, batch=args.batch)))
        framework, bare = [], []
        for _ in range(args.repeat):
            framework.append(
                sum(result.seconds for result in run_rounds_of(run_context(experiment), in_process(experiment)))
            )
            bare.append(bare_loop(experiment, steps=args.steps, batch=args.batch))
    ratios = [ours / theirs for ours, theirs in zip(framework, bare, strict=True)]
    print(
        json.dumps(
            {
                "case": "local steps through fedtune against a bare loop",
                "base": args.base,
                "threads": args.threads,
                "steps": 2 * len(experiment.fleet) * args.steps,
                "batch": args.batch,
                "fedtune_seconds": [round(value, 2) for value in framework],
                "bare_seconds": [round(value, 2) for value in bare],
                "ratio_median": round(median(ratios), 3),
                "ratio_best": round(min(framework) / min(bare), 3),
            }
        )
    )


def recipe(folder: str, base: str, *, steps: int, batch: int) -> dict[str, Any]:
    return {
        "name": "overhead",
        "model": {"base": base, "device": "cpu"},
        "adapter": {"rank": 8, "targets": TARGETS},
        "method": {"name": "fedit"},  # trains one adapter, as the bare loop does: flora adds a frozen one to the model
        "client": {"steps": steps, "batch": batch, "learning_rate": 1e-3},
        "rounds": {"count": 2},
        "data": {"source": f"{folder}/data/*.jsonl", "split": {"kind": "files"}, "max_tokens": 160},
    }


def bare_loop(experiment: Experiment, *, steps: int, batch: int) -> float:
    """Return the seconds of the same steps, client after client, without fedtune."""
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(experiment.base.path)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    pad = experiment.base.pad_id
    began = time.perf_counter()
    model.train()
    for _ in range(2):
        for shard in experiment.federation.clients.values():
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
            order = shuffled(len(shard.train), steps * batch)
            for step in range(steps):
                rows = [shard.train[i].input_ids for i in order[step * batch : (step + 1) * batch]]
                width = max(len(row) for row in rows)
                ids = torch.full((len(rows), width), pad)
                labels = torch.full((len(rows), width), -100)
                mask = torch.zeros((len(rows), width), dtype=torch.long)
                for at, row in enumerate(rows):
                    ids[at, : len(row)] = labels[at, : len(row)] = torch.from_numpy(row)
                    mask[at, : len(row)] = 1
                loss = model(input_ids=ids, attention_mask=mask, labels=labels).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
    return time.perf_counter() - began


def shuffled(count: int, wanted: int) -> Sequence[int]:
    """Return positions in random order, epoch after epoch."""
    order: list[int] = []
    source = torch.Generator().manual_seed(0)
    while len(order) < wanted:
        order += torch.randperm(count, generator=source).tolist()
    return order


if __name__ == "__main__":
    main()
