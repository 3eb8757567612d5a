"""What hundreds of rounds of `flora` cost the server: time, bytes and memory, by layer and round, on one core.

    python benchmarks/scale.py                                200 rounds, layers of 1024, 2048 and 4096 squared
    python benchmarks/scale.py --rounds 20 --layers 1024      in seconds
    python benchmarks/scale.py --state exact --rounds 8       what it costs to keep everything

Ten clients of rank 16 that train on, in bf16. Their changes are drawn, with the decay of singular values and the
agreement between clients of a real run. Times are the process's CPU time: other load on the machine does not count.
Prints one JSON line per layer.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    ClientUpdate,
    LoraResult,
    Plan,
    PlannedClient,
    Training,
)
from fedtune.methods import flora
from fedtune.methods.serialization import encode
from fedtune.seeds import derive, generator
from fedtune.tensors import Array, Tensors, cast, num_bytes

DECAY = (1.0, 0.88, 0.80, 0.73, 0.66, 0.61, 0.58, 0.54, 0.50, 0.46, 0.43, 0.40, 0.37, 0.33, 0.31, 0.26)
"""Singular values of one client's change of a layer in a round, in the largest: the median over clients and down_proj
layers in round 6 of stories260k on Dolly's ten clients (simulations/dolly10/continue-r16.toml, 5 steps of 4 rows, 96
tokens, exact state). Those of q_proj and up_proj fall faster."""
AGREEMENT = 0.04
"""Cosine between two clients' changes of a layer, the median of the same run."""
TRAINING = Training(batch=1, learning_rate=1.0, steps=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--layers", type=int, nargs="+", default=[1024, 2048, 4096], help="rows and columns of each")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--state", default="auto", help="method.state_max_rank: auto, exact or a number")
    args = parser.parse_args()
    bound = int(args.state) if args.state.isdigit() else args.state
    for size in args.layers:
        numbers = run(size, args.rounds, args.clients, args.rank, flora.FloraSettings(state_max_rank=bound))
        rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in numbers.items()}
        print(json.dumps({"case": "scale", "state_max_rank": bound, "size": size, **rounded}), flush=True)


def run(size: int, rounds: int, clients: int, rank: int, settings: flora.FloraSettings) -> Mapping[str, Any]:
    """Run the rounds of one layer, and return what they cost."""
    state = flora.init(Blueprint(modules={"layer": (size, size)}, saved={}, max_rank=rank, seed=0), settings)
    seconds, down, up, memory, ranks, energy = [], [], [], [], [], []
    for _ in range(rounds):
        began = time.process_time()
        assignments = [flora.assign(state, 0, planned(client, rank)) for client in range(clients)]
        spent = time.process_time() - began
        updates = [answer(assignment, size) for assignment in assignments]
        with threadpool_limits(1, user_api="blas"):
            began = time.process_time()
            state = flora.aggregate(state, updates)
            seconds.append(spent + time.process_time() - began)
        down.append(sum(map(num_bytes, assignments[0].lora.blobs.values())))
        up.append(num_bytes(updates[0].lora.tensors))
        memory.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        ranks.append(int(state.delta["layer.s"].size))
        energy.append(float(np.sum(np.square(state.delta["layer.s"], dtype=np.float64))))
    full = next((number for number, r in enumerate(ranks) if r == ranks[-1]), 0)
    dropped = float(state.delta["layer.dropped"][0]) if "layer.dropped" in state.delta else 0.0
    return {
        "rounds": rounds,
        "clients": clients,
        "rank": rank,
        "state_rank": ranks[-1],
        "full_in_round": full + 1,
        "seconds_a_round_median": float(np.median(seconds[1:])),
        "seconds_a_round_largest": max(seconds[1:]),
        "seconds_by_round": [float(f"{value:.3g}") for value in seconds[:10]],
        "down_over_up": sum(down) / sum(up),
        "down_bytes_a_round": down[-1],
        "up_bytes_a_round": up[-1],
        "state_bytes": sum(len(part) for part in encode(state)),
        "peak_bytes_when_full": memory[min(full + 2, rounds - 1)],
        "peak_bytes_at_the_end": memory[-1],
        "energy_kept": energy[-1] / (energy[-1] + dropped),
    }


def planned(client: int, rank: int) -> PlannedClient:
    return PlannedClient(Plan(client=f"client-{client:02d}", rank=rank, scale=2.0, training=TRAINING))


def answer(assignment: Assignment, size: int) -> AdmittedUpdate:
    """Return a client's update: what all clients agree on in the round, and its own part."""
    rank, number, client = assignment.plan.rank, assignment.round, assignment.plan.client
    tensors: dict[str, Array] = {}
    for side in ("a", "b"):
        shared = directions(rank, size, f"{number // 10} {side}")  # what clients agree on lasts for some rounds
        own = directions(rank, size, f"{number} {side} {client}")
        moved = np.sqrt(AGREEMENT) * shared + np.sqrt(1 - AGREEMENT) * own
        tensors[f"layer.{side}"] = moved if side == "a" else moved.T
    sent: Tensors = cast(tensors, assignment.lora.wire_dtype)
    return AdmittedUpdate(ClientUpdate(client, number, 100, LoraResult(sent)))


def directions(rank: int, size: int, key: str) -> Array:
    """Return rows (rank, size) whose singular values fall as those of a real change do, a hundredth in norm."""
    rng = generator(derive(0, "benchmark.scale", client=key))
    rows = rng.standard_normal((rank, size), dtype=np.float32) / np.float32(np.sqrt(size))
    turn = np.linalg.qr(rng.standard_normal((rank, rank)))[0].astype(np.float32)
    decay = np.interp(np.linspace(0, 1, rank), np.linspace(0, 1, len(DECAY)), DECAY).astype(np.float32)
    return np.float32(0.01) * (turn * decay) @ rows


if __name__ == "__main__":
    main()
