"""A frozen base in NF4 and int8 beside 16 and 32 bits: memory of its linear layers, peak of loading, step, quality.

    python benchmarks/quantised_base.py [memory] [step] [quality] [--base FOLDER] [--data FOLDER] [--seeds 3]

Memory and step are of a Llama of about 40 million parameters made here, whose widths are multiples of 64. Steps take
turns, in CPU seconds on one thread; ratios are to float32 of the same turn, with the kernels of bitsandbytes where they
are installed. Quality is the matrix of all formats: an adapter is trained over each, and its loss on held-out rows is
taken over each. Prints one JSON line per case.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import mean, median, pstdev
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.pruned import llama, tokens
from fedtune.data.federation import federate
from fedtune.data.settings import DataSettings, Split
from fedtune.lora.adapter import Factors
from fedtune.messages import Plan, Training, TrainLora
from fedtune.model.base import Base, load, load_tokenizer
from fedtune.model.evaluate import evaluate
from fedtune.model.libraries import threads
from fedtune.model.lora import read_local, start, with_adapters
from fedtune.model.quantised_layers import quantisable, quantised_layers
from fedtune.model.settings import AdapterSettings, ModelSettings
from fedtune.model.train import train

EVERY = AdapterSettings(rank=8, targets=["all-linear"])
CASES = ("memory", "step", "quality")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", default=CASES, choices=(*CASES, "loading"))
    parser.add_argument("--base", default="../shared/models/stories260k-hf", help="of the quality's matrix")
    parser.add_argument("--data", default="../shared/data/dolly")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rows", type=int, default=256, help="held-out examples that are scored")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--dtype", default="float32", help="of the case loading, which runs in a process of its own")
    args = parser.parse_args()
    if args.cases == ["loading"]:
        print(json.dumps(loading(args.base, args.dtype)))
        return
    with threads(1), tempfile.TemporaryDirectory() as folder:
        if {"memory", "step"} & {*args.cases}:
            llama().save_pretrained(folder)
            AutoTokenizer.from_pretrained(args.base).save_pretrained(folder)
        if "memory" in args.cases:
            memory(folder)
        if "step" in args.cases:
            step(folder, args.repeats)
        if "quality" in args.cases:
            quality(args)


def loaded(folder: str, dtype: str, kernels: str = "auto") -> Base:
    settings = ModelSettings(base=folder, dtype=dtype, kernels=kernels, device="cpu")  # type: ignore[arg-type]
    return load(settings, EVERY, tokenizer=load_tokenizer(settings, Path()), root=Path(), seed=0)


def memory(folder: str) -> None:
    """Print what the linear layers of blocks take in each format, and the peak of a process that loads the base."""
    plain = loaded(folder, "bfloat16")
    half = sum(plain.model.get_submodule(name).weight.nbytes for name in quantisable(plain.model))
    everything = sum(parameter.nbytes for parameter in plain.model.parameters())
    for dtype in ("nf4", "int8"):
        layers = quantised_layers(loaded(folder, dtype).model).values()
        taken = sum(layer.codes.nbytes + layer.scales.nbytes for layer in layers)
        line = {"case": "linear layers", "dtype": dtype, "bytes": taken, "bfloat16": half}
        print(json.dumps(line | {"share": round(taken / half, 4), "layers": len(layers), "model_bfloat16": everything}))
    for dtype in ("float32", "bfloat16", "int8", "nf4"):
        command = [sys.executable, "-m", "benchmarks.quantised_base", "loading", "--base", folder, "--dtype", dtype]
        print(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip())


def loading(folder: str, dtype: str) -> Mapping[str, object]:
    """Return the peak of this process while it loads a base, above what it has before, and what is left afterwards."""
    settings = ModelSettings(base=folder, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    tokenizer, before = load_tokenizer(settings, Path()), resident("VmRSS")
    base = load(settings, EVERY, tokenizer=tokenizer, root=Path(), seed=0)
    own = sum(tensor.nbytes for tensor in (*base.model.parameters(), *base.model.buffers()))
    peak = resident("VmHWM") - before
    return {"case": "loading", "dtype": dtype, "peak_mib": round(peak / 2**20, 1), "tensors_mib": round(own / 2**20, 1)}


def resident(what: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(what)))


def step(folder: str, repeats: int) -> None:
    """Print the CPU time of a training step over each format, as a share of float32's in the same turn."""
    bases = {dtype: loaded(folder, dtype) for dtype in ("float32", "int8", "nf4")}
    if find_spec("bitsandbytes") is not None:
        bases["nf4, bitsandbytes"] = loaded(folder, "nf4", "bitsandbytes")
    for batch, length in ((4, 128), (1, 128)):
        seconds: dict[str, list[float]] = {name: [] for name in bases}
        for turn in range(repeats + 1):
            for name, base in bases.items():
                spent = cpu_seconds(one_step(base, batch, length))
                seconds[name] += [spent] if turn else []  # the first one allocates
        for name, turns in seconds.items():
            ratios = [ours / plain for ours, plain in zip(turns, seconds["float32"], strict=True)]
            line = {"case": "step", "dtype": name, "batch": batch, "tokens": length, "ratio": round(median(ratios), 3)}
            spread = [round(min(ratios), 3), round(max(ratios), 3)]
            print(json.dumps(line | {"spread": spread, "cpu_s": round(median(turns), 3)}))


def one_step(base: Base, batch: int, length: int) -> Callable[[], None]:
    ids = tokens(base.model, batch, length, torch.device("cpu"))

    def work() -> None:
        plan = Plan("a", 8, 2.0, Training(steps=1))
        with with_adapters(base, local=start(TrainLora(a_key=1), plan, base.modules), scale=2.0) as model:
            model(input_ids=ids, labels=ids).loss.backward()

    return work


def cpu_seconds(work: Callable[[], Any]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def quality(args: argparse.Namespace) -> None:
    """Print held-out losses of adapters trained over each format and evaluated over each."""
    bases = {dtype: loaded(args.base, dtype) for dtype in ("bfloat16", "int8", "nf4")}
    tokenizer = next(iter(bases.values())).tokenizer

    def rows(file: str, limit: int | None) -> Sequence[Any]:
        split = Split("iid", clients=1)
        data = DataSettings(f"{args.data}/{file}", split, max_tokens=args.max_tokens, held_out=0.0, limit=limit)
        [shard] = federate(data, tokenizer=tokenizer, task="causal", seed=0, root=Path()).clients.values()
        return shard.train

    examples, dev = rows("small_train.jsonl", None), rows("small_dev.jsonl", args.rows)
    training = Training(batch=args.batch, steps=args.steps, learning_rate=args.learning_rate, schedule="linear")
    losses: dict[tuple[str, str], list[float]] = {}
    for seed in range(args.seeds):
        for trained, base in bases.items():
            plan = Plan("a", 8, 2.0, training)
            initial = start(TrainLora(a_key=seed), plan, base.modules)
            with with_adapters(base, local=initial, scale=2.0) as model:
                train(base, examples, training, key=seed, client="a")
                final = {name: Factors(part.a, part.b * 2.0) for name, part in read_local(model).items()}
            for evaluated, other in bases.items():
                scores = evaluate(other, final, {}, {"dev": dev}, batch=16)["dev"]
                losses.setdefault((trained, evaluated), []).append(scores["loss"])
            print(f"seed {seed}, trained over {trained}", file=sys.stderr)
    untrained = {name: evaluate(base, {}, {}, {"dev": dev}, batch=16)["dev"]["loss"] for name, base in bases.items()}
    print(
        json.dumps({"case": "untrained", "base": Path(args.base).name} | {n: round(v, 4) for n, v in untrained.items()})
    )
    plain = losses["bfloat16", "bfloat16"]
    for (trained, evaluated), values in losses.items():
        line = {"case": "quality", "trained": trained, "evaluated": evaluated, "loss": round(mean(values), 4)}
        gap = mean(ours / theirs - 1 for ours, theirs in zip(values, plain, strict=True))
        line |= {"spread": round(pstdev(values), 4), "relative": round(gap, 5), "seeds": args.seeds}
        print(json.dumps(line | {"steps": args.steps, "batch": args.batch}))


if __name__ == "__main__":
    main()
