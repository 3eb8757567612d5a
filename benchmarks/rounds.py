"""What the framework itself costs in a round, when the clients' work is nothing: encode, decode, admit, aggregate.

    python benchmarks/rounds.py

Every message is encoded and decoded as in a real run; clients answer with an update that was made beforehand. Then what
it costs to read and admit one update of 16.8 MB, which is rank 16 in 64 layers of 4096 x 4096, in bf16. Prints one JSON
line per case: processor time of a round, or of an update, the median and the best.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import median

import numpy as np

from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    Client,
    ClientUpdate,
    LoraResult,
    PlannedClient,
    Training,
    TrainLora,
)
from fedtune.methods import METHODS
from fedtune.planning.fixed import Fixed
from fedtune.planning.planner import Planner
from fedtune.rounds.admission import admit
from fedtune.rounds.context import RoundContext
from fedtune.rounds.influence import Bounds
from fedtune.rounds.loop import run
from fedtune.rounds.schedule import Schedule
from fedtune.seeds import generator
from fedtune.simulation.inprocess import InProcess
from fedtune.tensors import Tensors, cast
from fedtune.wire.codec import decode_update, encode_update

# A rate by which the planned step can reach what the clients answer, which is not trained.
TRAINING = Training(batch=1, learning_rate=1e3, steps=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--layers", type=int, default=64, help="of the update that is admitted")
    args = parser.parse_args()
    methods = [name for name, each in METHODS.items() if each.task is TrainLora]
    for method in methods:
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
                        **({"target_ms": 60, "met": median(times) <= 0.06} if clients == 100 else {}),
                    }
                ),
                flush=True,
            )
    for method in methods:
        spent, num_bytes = admission(method, layers=args.layers, size=4096, rank=16)
        fact = {"case": "admission of one update", "method": method, "megabytes": round(num_bytes / 1e6, 1)}
        print(json.dumps({**fact, **{key: round(1000 * value, 1) for key, value in spent.items()}}), flush=True)


def seconds(method: str, *, clients: int, modules: int, size: int, rank: int, rounds: int) -> Sequence[float]:
    """Return the processor time of each round but the first two, in which caches fill."""
    names = [f"client-{i:03d}" for i in range(clients)]
    layers = {f"layers.{i}": (size, size) for i in range(modules)}
    ready = drawn_factors(layers, rank, key=0)
    results = run(
        RoundContext(
            method=METHODS[method],
            settings=METHODS[method].settings(wire_dtype="bf16"),
            planner=planner(rank),
            transport=InProcess([Client(name, 10) for name in names], {name: partial(answer, ready) for name in names}),
            schedule=Schedule(count=rounds + 2),
            blueprint=Blueprint(modules=layers, saved={}, max_rank=rank, seed=0),
            base="",
        )
    )
    times, began = [], time.process_time()
    for _ in results:
        times.append(time.process_time() - began)
        began = time.process_time()
    return times[2:]


def admission(method: str, *, layers: int, size: int, rank: int) -> tuple[Mapping[str, float], int]:
    """Return the processor time of one update until it is admitted, by case, and its bytes.

    In the first round, where nothing has been learned, and in the second, which starts from what the first has left.
    """
    modules = {f"layers.{i}": (size, size) for i in range(layers)}
    chosen, planned = METHODS[method], planner(rank)
    blueprint = Blueprint(modules=modules, saved={}, max_rank=rank, seed=0)
    state, times, num_bytes = chosen.init(blueprint, chosen.settings(wire_dtype="bf16")), dict[str, float](), 0
    for round in ("first", "second"):
        client = planned.plan(planned.start(), state.round + 1, [Client("client", 10)])["client"]
        assert isinstance(client, PlannedClient)
        assignment = chosen.assign(state, 0, client)
        encoded = encode_update(answer(drawn_factors(modules, rank, key=state.round), assignment))
        bounds, spent, outcome = Bounds(chosen, state, blueprint), list[float](), None
        for _ in range(4):
            began = time.process_time()
            update = decode_update(encoded, client="client", limit_bytes=len(encoded))
            outcome = admit(update, assignment, blueprint, num_examples=10)
            assert isinstance(outcome, AdmittedUpdate), outcome
            outcome = bounds.bound(outcome, assignment)
            spent.append(time.process_time() - began)
        assert isinstance(outcome, AdmittedUpdate), outcome
        times |= {f"{round}_round_ms": median(spent[1:]), f"{round}_round_best_ms": min(spent)}
        num_bytes = len(encoded)
        state = chosen.aggregate(state, [outcome])
    return times, num_bytes


def planner(rank: int) -> Planner:
    return Fixed(lambda name: (rank, TRAINING), alpha="2r", rslora=False)


def drawn_factors(layers: Mapping[str, tuple[int, int]], rank: int, *, key: int) -> Tensors:
    """Return an update's factors in bf16."""
    rng = generator(key)
    # Small, since every round adds them again: changes that pile up would leave the bounds of admission.
    return cast(
        {
            f"{layer}.{side}": (0.01 * rng.standard_normal((rank, n) if side == "a" else (m, rank))).astype(np.float32)
            for layer, (m, n) in layers.items()
            for side in "ab"
        },
        "bf16",
    )


def answer(ready: Tensors, assignment: Assignment) -> ClientUpdate:
    trained = {name: tensor for name, tensor in ready.items() if name.rpartition(".")[2] in assignment.lora.train}
    result = LoraResult(trained, base=assignment.base)
    return ClientUpdate(assignment.plan.client, assignment.round, 10, result)


if __name__ == "__main__":
    main()
