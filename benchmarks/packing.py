"""Padding of the same batches unpacked, in batches of similar length, and packed; and the time of packed steps.

    python benchmarks/packing.py [--base FOLDER] [--data FILE] [--batch 8] [--steps 20] [--seeds 3]

All three read each example once in an epoch. Only packing leaves the batches, and so the result, as they are: what is
compared in time is the same training, in turn, with the largest difference of a step's loss. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np

from fedtune.data.encode import Example
from fedtune.data.federation import federate
from fedtune.data.settings import DataSettings, Split
from fedtune.messages import Plan, Training, TrainLora
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.batches import rows_of
from fedtune.model.libraries import threads
from fedtune.model.lora import start, with_adapters
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.train import train
from fedtune.probing.order import batches

WINDOW = 16
"""Batches that are sorted by length together, for the comparison."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="../shared/models/stories260k-hf")
    parser.add_argument("--data", default="../shared/data/dolly/train.jsonl")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=20, help="0 measures the padding alone")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    settings = ModelSettings(base=args.base, device="cpu")
    tokenizer = load_tokenizer(settings, Path())
    adapter = AdapterSettings(rank=8, targets=["q_proj", "v_proj"])
    base = load(settings, adapter, tokenizer=tokenizer, root=Path(), seed=0)
    data = DataSettings(args.data, Split("iid", clients=1), max_tokens=args.max_tokens, held_out=0.0)
    [shard] = federate(data, tokenizer=tokenizer, task="causal", seed=0, root=Path()).clients.values()
    lengths = [len(example.input_ids) for example in shard.train]
    shares = [padding(lengths, args.batch, key) for key in range(args.seeds)]
    line = {
        "case": "padding and time of packed batches",
        "batch": args.batch,
        "padding_plain": [round(share[0], 3) for share in shares],
        "padding_buckets": [round(share[1], 3) for share in shares],
        "padding_packed": [round(share[2], 3) for share in shares],
    }
    if args.steps:
        training = Training(batch=args.batch, steps=args.steps, learning_rate=1e-3)
        line |= times(base, shard.train, training, seeds=args.seeds)
    print(json.dumps(line))


def times(base: Base, examples: Sequence[Example], training: Training, *, seeds: int) -> Mapping[str, object]:
    """Return CPU seconds of both ways in turn, their ratio, and how far the losses of their steps are apart."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    gaps = list[float]()
    with threads(1):
        for key in range(seeds):
            losses = {}
            for packing in seconds:
                spent, losses[packing] = timed(base, examples, replace(training, packing=packing), key)
                seconds[packing].append(spent)
            gaps.append(float(np.max(np.abs(np.subtract(losses[True], losses[False])))))
    return {
        "cpu_seconds_plain": [round(value, 3) for value in seconds[False]],
        "cpu_seconds_packed": [round(value, 3) for value in seconds[True]],
        "ratio": round(median(ours / plain for ours, plain in zip(seconds[True], seconds[False], strict=True)), 3),
        "largest_loss_gap": max(gaps),
    }


def padding(lengths: Sequence[int], batch: int, key: int) -> tuple[float, float, float]:
    """Return the share of padding of an epoch: as it is, with batches of similar length, and packed."""
    steps = -(-len(lengths) // batch)
    plain = [[lengths[i] for i in rows] for rows in islice(batches(len(lengths), size=batch, key=key), steps)]
    order = [length for rows in plain for length in rows]
    windows = [sorted(order[at : at + WINDOW * batch]) for at in range(0, len(order), WINDOW * batch)]
    buckets = [window[at : at + batch] for window in windows for at in range(0, len(window), batch)]
    areas = [sum(max(rows) * len(rows) for rows in way) for way in (plain, buckets)]
    areas.append(sum(max(rows) * len(rows_of(rows)) for rows in plain))
    first, second, third = (1 - sum(lengths) / area for area in areas)
    return first, second, third


def timed(base: Base, examples: Sequence[Example], training: Training, key: int) -> tuple[float, Sequence[float]]:
    """Return CPU seconds and losses of a training of a new adapter."""
    local = start(TrainLora(a_key=5), Plan("c", 8, 2.0, training), base.modules)
    with with_adapters(base, local=local, scale=2.0):
        train(base, examples, replace(training, steps=1), key=key, client="c")  # warms up
        began = time.process_time()
        losses = train(base, examples, training, key=key, client="c").losses
        return time.process_time() - began, losses


if __name__ == "__main__":
    main()
