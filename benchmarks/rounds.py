"""What the framework itself costs in a round, when the clients' work is nothing: encode, decode, admit, aggregate.

    python benchmarks/rounds.py

Every message is encoded and decoded as in a real run; clients answer with an update that was made beforehand. Prints
one JSON line per case; times are per round, the median and the best of the rounds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np

from fedtune.messages import (
    Assignment,
    Blueprint,
    Client,
    ClientUpdate,
    LoraResult,
    Training,
    TrainLora,
)
from fedtune.methods import METHODS
from fedtune.planning.fixed import Fixed
from fedtune.rounds.context import RoundContext
from fedtune.rounds.loop import run
from fedtune.rounds.schedule import Schedule
from fedtune.seeds import generator
from fedtune.simulation.inprocess import InProcess
from fedtune.tensors import Tensors, cast

# A rate by which the planned step can reach what the clients answer, which is not trained.
TRAINING = Training(batch=1, learning_rate=1e3, steps=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    for method in [name for name, each in METHODS.items() if each.task is TrainLora]:
        for clients in (8, 32, 100):
            times = seconds(method, clients=clients, modules=4, size=64, rank=4, rounds=args.rounds)
            print(
                json.dumps(
                    {
                        "case": "framework time of a round",
                        "method": method,
                        "clients": clients,
                        "modules": 4,
                        "size": 64,
                        "rank": 4,
                        "median_ms": round(1000 * median(times), 2),
                        "best_ms": round(1000 * min(times), 2),
                    }
                ),
                flush=True,
            )


def seconds(method: str, *, clients: int, modules: int, size: int, rank: int, rounds: int) -> Sequence[float]:
    """Return the time of each round but the first two, in which caches fill."""
    names = [f"client-{i:03d}" for i in range(clients)]
    layers = {f"layers.{i}": (size, size) for i in range(modules)}
    rng = generator(0)
    # Small, since every round adds them again: changes that pile up would leave the bounds of admission.
    factors = {
        f"{layer}.{side}": (0.01 * rng.standard_normal((rank, size) if side == "a" else (size, rank))).astype(
            np.float32
        )
        for layer in layers
        for side in "ab"
    }
    ready = cast(factors, "bf16")
    results = run(
        RoundContext(
            method=METHODS[method],
            settings=METHODS[method].settings(),
            planner=Fixed(lambda name: (rank, TRAINING), alpha="2r", rslora=False),
            transport=InProcess([Client(name, 10) for name in names], {name: partial(answer, ready) for name in names}),
            schedule=Schedule(count=rounds + 2),
            blueprint=Blueprint(modules=layers, saved={}, max_rank=rank, seed=0),
            base="",
        )
    )
    return [result.seconds for result in results][2:]


def answer(ready: Tensors, assignment: Assignment) -> ClientUpdate:
    kept = {name: tensor for name, tensor in ready.items() if name.rpartition(".")[2] in assignment.lora.train}
    return replace(
        ClientUpdate(assignment.plan.client, assignment.round, 10, LoraResult(kept)),
        result=replace(
            ClientUpdate(assignment.plan.client, assignment.round, 10, LoraResult(kept)).lora, base=assignment.base
        ),
    )


if __name__ == "__main__":
    main()
