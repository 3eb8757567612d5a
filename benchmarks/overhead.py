"""The same local steps in fedtune's rounds and in a bare PyTorch and peft loop, in turn, in one run.

    python benchmarks/overhead.py [--base FOLDER] [--threads 1] [--steps 6 20 100] [--repeat 5]

The bare loop is what one would write by hand: one peft model, one AdamW, the same batches of the same examples. Beside
it stand fedtune's rounds, with everything between the steps: adapters attached and removed, messages encoded and
decoded, losses measured before and after, updates admitted and aggregated. flora's rounds begin after ten rounds, whose
accumulated change is frozen in the clients' model, as the default bounds it and in full. Scoring and loading are left
out. Processor time, pairs of one round and one bare loop in turn. Prints one JSON line per method and number of steps,
and one for a single step of a model with a frozen change against one without.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fedtune.client import perform
from fedtune.config import bind
from fedtune.lora.adapter import Factors
from fedtune.model import train as training
from fedtune.model.base import Base
from fedtune.model.batches import collate
from fedtune.model.libraries import quiet, threads
from fedtune.model.lora import with_adapters
from fedtune.model.loss import summed_loss
from fedtune.rounds import exchange, loop
from fedtune.runs.demo_code import write_data
from fedtune.runs.local import Experiment, in_process, prepare, run_context
from fedtune.runs.runner import run_rounds_of
from fedtune.simulation import inprocess

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]
METHODS = {
    "fedit": {"name": "fedit"},
    "flora": {"name": "flora"},
    "flora, exact": {"name": "flora", "state_max_rank": "exact"},
}
EARLIER = 10
"""Rounds whose change is frozen in the model that is measured."""
EARLIER_STEPS = 2
"""Of each client in these rounds: their number decides the rank of what is frozen, not its cost."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="embedded", help="folder of a causal model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, nargs="+", default=[6, 20, 100], help="of each client in a round")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--clients", type=int, default=8, help="at most 8")
    parser.add_argument("--repeat", type=int, default=5, help="pairs of a round and a bare loop")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, threads(args.threads):
        write_data(Path(folder) / "data")
        for path in sorted((Path(folder) / "data").glob("*.jsonl"))[args.clients :]:
            path.unlink()
        for method in args.methods:
            settings, state = METHODS[method], None
            first = prepare(bind(recipe(folder, args.base, settings, steps=EARLIER_STEPS, batch=args.batch)))
            for result in run_rounds_of(run_context(first), in_process(first)):
                state = result.state
                if result.round == EARLIER:
                    break
            for steps in args.steps:
                experiment = prepare(bind(recipe(folder, args.base, settings, steps=steps, batch=args.batch)))
                line = {"case": "rounds against a bare loop", "base": args.base, "method": method, "steps": steps}
                print(json.dumps(line | compare(experiment, state, steps=steps, args=args)), flush=True)
        for dense in (False, True):
            print(json.dumps(compare_step(first, dense=dense, args=args)), flush=True)


def recipe(folder: str, base: str, method: dict[str, Any], *, steps: int, batch: int) -> dict[str, Any]:
    return {
        "name": "overhead",
        "model": {"base": base, "device": "cpu"},
        "adapter": {"rank": 8, "targets": TARGETS},
        "method": method,
        "client": {"steps": steps, "batch": batch, "learning_rate": 1e-3},
        "rounds": {"count": 1000},
        "data": {"source": f"{folder}/data/*.jsonl", "split": {"kind": "files"}, "max_tokens": 160},
    }


def compare(experiment: Experiment, state: Any, *, steps: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return the processor time of rounds, of the same steps in a bare loop, and the shares of the rounds' parts."""
    shares = defaultdict[str, float](float)
    bare = bare_loop(experiment, steps=steps, batch=args.batch)
    ours, theirs = list[float](), list[float]()
    with measured_parts(shares):
        rounds = run_rounds_of(run_context(experiment), in_process(experiment), start=state)
        next(rounds), next(bare)  # not measured: the first of both fills caches and allocates
        shares.clear()
        for _ in range(args.repeat):
            began = time.process_time()
            result = next(rounds)
            ours.append(time.process_time() - began)
            theirs.append(next(bare))
    assert all(hasattr(outcome, "lora") for outcome in result.outcomes.values())
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    return {
        "threads": args.threads,
        "clients": len(experiment.fleet),
        "batch": args.batch,
        "fedtune_cpu_seconds": [round(value, 2) for value in ours],
        "bare_cpu_seconds": [round(value, 2) for value in theirs],
        "ratio_median": round(median(ratios), 3),
        "ratio_least_and_most": [round(min(ratios), 3), round(max(ratios), 3)],
        "ratio_of_least": round(min(ours) / min(theirs), 3),
        "share": {part: round(seconds / sum(ours), 4) for part, seconds in sorted(shares.items())},
    }


@contextmanager
def measured_parts(seconds: defaultdict[str, float]) -> Iterator[None]:
    """Add up, inside the block, the processor time of what rounds do beside steps."""
    with ExitStack() as stack:
        for owner, name, part in (
            (training, "row_losses", "losses before and after"),
            (loop, "aggregate", "aggregate"),
            (loop, "encode_assignment", "encode and decode"),
            (inprocess, "decode_assignment", "encode and decode"),
            (inprocess, "encode_update", "encode and decode"),
            (exchange, "decode_and_admit", "decode and admit"),
            (perform, "start", "attach"),
            (perform, "frozen_change", "attach"),
            (perform, "read_local", "attach"),
        ):
            stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), seconds, part)))
        stack.enter_context(mock.patch.object(perform, "with_adapters", timed_block(with_adapters, seconds, "attach")))
        yield


def timed(function: Callable[..., Any], seconds: defaultdict[str, float], part: str) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        began = time.process_time()
        try:
            return function(*args, **options)
        finally:
            seconds[part] += time.process_time() - began

    return call


def timed_block(manager: Callable[..., Any], seconds: defaultdict[str, float], part: str) -> Callable[..., Any]:
    """Return a context manager whose entry and exit are timed, not its block."""

    @contextmanager
    def call(*args: Any, **options: Any) -> Iterator[Any]:
        context = manager(*args, **options)
        value = timed(context.__enter__, seconds, part)()
        try:
            yield value
        finally:
            timed(context.__exit__, seconds, part)(None, None, None)

    return call


def bare_loop(experiment: Experiment, *, steps: int, batch: int) -> Iterator[float]:
    """Yield the processor time of the same steps, client after client, without fedtune: one round's after another."""
    with quiet():
        base = AutoModelForCausalLM.from_pretrained(experiment.base.path)
        model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM"))
    pad = experiment.base.pad_id
    model.train()
    while True:
        began = time.process_time()
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
                loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        yield time.process_time() - began


def shuffled(count: int, wanted: int) -> Sequence[int]:
    """Return positions in random order, epoch after epoch."""
    order: list[int] = []
    source = torch.Generator().manual_seed(0)
    while len(order) < wanted:
        order += torch.randperm(count, generator=source).tolist()
    return order


def compare_step(experiment: Experiment, *, dense: bool, args: argparse.Namespace) -> dict[str, Any]:
    """Return the processor time of one step with a frozen change over one without, and what the change adds."""
    base, rng = experiment.base, np.random.default_rng(0)
    local, low = (random_adapter(base, rank, rng) for rank in (8, 16))
    frozen: dict[str, Any] = {name: f.b @ f.a for name, f in low.items()} if dense else low
    rows = next(iter(experiment.federation.clients.values())).train[: args.batch]
    times: dict[bool, list[float]] = {False: [], True: []}
    attach = list[float]()
    for _ in range(3 * args.repeat):
        for with_change in times:
            began = time.process_time()
            with with_adapters(base, frozen=frozen if with_change else {}, local=local, scale=2.0) as model:
                attach.append(time.process_time() - began)
                began = time.process_time()
                batch = collate(rows, base)
                (summed_loss(model, batch, task=base.task) / batch.count).backward()
                times[with_change].append(time.process_time() - began)
    ratios = [one / other for one, other in zip(times[True], times[False], strict=True)]
    layers = sum(m * n for m, n in base.modules.values())
    return {
        "case": "one step with a frozen change against one without",
        "base": args.base,
        "frozen": "dense" if dense else "factors of rank 16",
        "ratio_median": round(median(ratios), 3),
        "ratio_of_least": round(min(times[True]) / min(times[False]), 3),
        "attach_ms_without_and_with": [round(1000 * min(attach[at::2]), 2) for at in (0, 1)],
        "copies_of_the_adapted_layers": sum(changed.weight.nelement() for changed in base.changed.values()) / layers,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def random_adapter(base: Base, rank: int, rng: np.random.Generator) -> dict[str, Factors]:
    return {
        name: Factors(
            a=(rng.normal(size=(rank, n)) / np.sqrt(n)).astype(np.float32),
            b=(0.01 * rng.normal(size=(m, rank))).astype(np.float32),
        )
        for name, (m, n) in base.modules.items()
    }


if __name__ == "__main__":
    main()
