"""What the clients' losses show where nothing can be learned, and where something is; and what measuring them costs.

    python benchmarks/null_experiment.py                 the demo's recipe at learning rates of 1e-9 and 1e-2
    python benchmarks/null_experiment.py --held-out 0    the same with losses on training rows

Prints one JSON line per learning rate: how much each client's loss fell in each round. At 1e-9 that must be nothing.
Then one line per length of training: its processor time with both measurements over that without them, in the median.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from fedtune.config import bind
from fedtune.data.loss_rows import loss_rows, num_loss_rows
from fedtune.messages import Plan, Training, TrainLora
from fedtune.model.libraries import quiet, threads
from fedtune.model.lora import start, with_adapters
from fedtune.model.train import train
from fedtune.runs.demo_code import recipe_text, write_data
from fedtune.runs.local import Experiment, in_process, prepare, run_context
from fedtune.runs.recording import client_record
from fedtune.runs.runner import run_rounds_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--base", default="embedded", help="folder of a causal model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--held-out", type=float, default=0.1, help="share of each client's rows")
    parser.add_argument("--steps", type=int, nargs="*", default=[6, 30, 120], help="lengths of training that are timed")
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, threads(args.threads), quiet():
        write_data(Path(folder) / "data")
        tables = recipe(Path(folder), args.base, rounds=args.rounds, held_out=args.held_out)
        for learning_rate in (1e-9, tables["client"]["learning_rate"]):
            print(json.dumps(gains(tables, learning_rate)), flush=True)
        experiment = prepare(bind(tables))
        for steps in args.steps:
            print(json.dumps(cost(experiment, steps, repeat=args.repeat)), flush=True)


def recipe(folder: Path, base: str, *, rounds: int, held_out: float) -> dict[str, Any]:
    """Return the demo's recipe."""
    tables = tomllib.loads(recipe_text())
    tables["model"]["base"] = base
    tables["data"] |= {"source": str(folder / "data" / "*.jsonl"), "held_out": held_out}
    tables["rounds"]["count"] = rounds
    return tables


def gains(tables: Mapping[str, Any], learning_rate: float) -> Mapping[str, Any]:
    """Return how much the clients' losses fell at a learning rate, over all clients and rounds."""
    experiment = prepare(bind({**tables, "client": {**tables["client"], "learning_rate": learning_rate}}))
    falls, means = [], []
    for result in run_rounds_of(run_context(experiment), in_process(experiment)):
        records = [client_record(result, name) for name in result.outcomes]
        falls += [(record.loss_before or 0.0) - (record.loss_after or 0.0) for record in records]
        means.append(round(float(np.mean(falls[-len(records) :])), 4) + 0.0)  # no minus zero
    low, middle, high = np.quantile(falls, [0, 0.5, 1]).tolist()
    return {
        "learning_rate": learning_rate,
        "clients": len(experiment.fleet),
        "rounds": len(means),
        "smallest": round(low, 4) + 0.0,
        "median": round(middle, 4) + 0.0,
        "largest": round(high, 4) + 0.0,
        "standard_deviation": round(float(np.std(falls)), 4),
        "rose": round(sum(fall < -1e-4 for fall in falls) / len(falls), 3),
        "mean_by_round": means,
    }


def cost(experiment: Experiment, steps: int, *, repeat: int) -> Mapping[str, Any]:
    """Return the time of a client's training with its losses measured, over the time without."""
    base, client = experiment.base, max(experiment.fleet, key=lambda name: experiment.fleet[name])
    training = replace(experiment.recipe.client, steps=steps)
    assert isinstance(training, Training)
    shard, count = experiment.federation.clients[client], num_loss_rows(steps * training.batch)
    rows = loss_rows(shard.train, shard.held_out, client, count=count)
    plan, ratios = Plan(client, 8, 2.0, training), []
    for _ in range(repeat):
        seconds = []
        for measured in ((), rows):
            with with_adapters(base, local=start(TrainLora(a_key=5), plan, base.modules), scale=2.0):
                began = time.process_time()
                train(base, shard.train, training, key=1, client=client, rows=measured)
                seconds.append(time.process_time() - began)
        ratios.append(seconds[1] / seconds[0])
    return {"steps": steps, "batch": training.batch, "rows": len(rows), "time_ratio": round(median(ratios), 3)}


if __name__ == "__main__":
    main()
