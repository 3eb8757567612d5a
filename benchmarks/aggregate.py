"""How long the server's stacking and recompression take, beside the ways it could have been done and what bounds it.

    python benchmarks/aggregate.py            64 layers of 4096 x 4096, ten clients of mixed rank
    python benchmarks/aggregate.py --quick    the same at a fiftieth of the work, in seconds

Prints one JSON line per case. Times are the best of the repetitions: other load on the machine only ever adds to them.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from fedtune.lora import lowrank
from fedtune.lora.adapter import Factors
from fedtune.messages import (
    AdmittedUpdate,
    Blueprint,
    ClientUpdate,
    LoraResult,
)
from fedtune.methods import flora
from fedtune.seeds import derive, generator
from fedtune.tensors import Array

RANKS = (64, 32, 16, 16, 8, 8, 4, 4, 4, 4)
"""Ranks of the FLoRA paper's ten clients; they add up to 160."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--modules", type=int, default=64)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of every layer")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, help="one per client")
    parser.add_argument("--dense-size", type=int, default=2048, help="of the dense SVD; scaled to --size by its cube")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="8 layers of 1024 x 1024, dense SVD of 512 x 512")
    args = parser.parse_args()
    modules, size, dense_size = (8, 1024, 512) if args.quick else (args.modules, args.size, args.dense_size)
    report("aggregate", **aggregate(modules, size, args.ranks, repeat=args.repeat))
    report("floors", **floors(size, sum(args.ranks), repeat=args.repeat))
    report("one layer", **one_layer(size, args.ranks, dense_size, repeat=args.repeat))
    report("many clients", **many_clients(size, clients=100, rank=16))


def aggregate(modules: int, size: int, ranks: Sequence[int], *, repeat: int) -> dict[str, Any]:
    """Time one round of `flora` on the server, from the clients' float32 factors to the next state."""
    names = [f"layers.{i}" for i in range(modules)]
    updates = []
    for client, rank in enumerate(ranks):
        tensors: dict[str, Array] = {}
        for name in names:
            factors = draw(size, rank, key=f"{client} {name}")
            tensors |= {f"{name}.a": factors.a, f"{name}.b": factors.b}
        updates.append(AdmittedUpdate(ClientUpdate(f"{client:03d}", 1, 100 + client, LoraResult(tensors))))
    shapes = dict.fromkeys(names, (size, size))
    state = flora.init(Blueprint(modules=shapes, saved={}, max_rank=max(ranks), seed=0), flora.FloraSettings())
    input_bytes = sum(tensor.nbytes for update in updates for tensor in update.lora.tensors.values())
    before = peak_bytes()
    seconds = best(lambda: flora.aggregate(state, updates), repeat)
    return {
        "modules": modules,
        "size": size,
        "ranks": list(ranks),
        "seconds": seconds,
        "seconds_per_module": seconds / modules,
        "input_bytes": input_bytes,
        "peak_bytes": peak_bytes(),
        "peak_bytes_before": before,
    }


def floors(size: int, rank: int, *, repeat: int) -> dict[str, Any]:
    """Measure what bounds a layer: one read of its factors, and the products of the Gram form at the GEMM rate."""
    source = np.ones(2**25)
    target = np.empty_like(source)
    copy_rate = 2 * source.nbytes / best(lambda: np.copyto(target, source), repeat)
    square = generator(0).standard_normal((1024, 1024))
    gemm_rate = 2 * 1024**3 / best(lambda: square @ square, repeat)
    flops = 4 * rank**2 * 2 * size + 22 * rank**3
    return {
        "copy_bytes_per_second": copy_rate,
        "float64_flops_per_second": gemm_rate,
        "read_seconds_per_module": 4 * rank * 2 * size / copy_rate,
        "flops_per_module": flops,
        "flop_seconds_per_module": flops / gemm_rate,
    }


def one_layer(size: int, ranks: Sequence[int], dense_size: int, *, repeat: int) -> dict[str, Any]:
    """Time the ways to decompose one layer's sum: Gram, QR, and the dense matrix."""
    parts = [(draw(size, rank, key=str(client)), 1 / len(ranks)) for client, rank in enumerate(ranks)]
    x = np.concatenate([weight * factors.b.astype(np.float64) for factors, weight in parts], axis=1)
    y = np.concatenate([factors.a.astype(np.float64) for factors, _ in parts])
    dense = (x[:dense_size] @ y[:, :dense_size]).astype(np.float32)
    scale = (size / dense_size) ** 3
    whole = best(lambda: lowrank.weighted_sums({"": parts}), repeat)
    dense_seconds = best(lambda: np.linalg.svd(dense, full_matrices=False), 1) * scale
    with threadpool_limits(1, user_api="blas"):  # as `weighted_sums` holds it
        gram, qr = best(lambda: lowrank._by_gram(x, y), repeat), best(lambda: lowrank._by_qr(x, y), repeat)
    return {
        "size": size,
        "rank": sum(ranks),
        "weighted_sum_seconds": whole,
        "gram_seconds": gram,
        "qr_seconds": qr,
        "dense_float32_seconds": dense_seconds,
        "dense_measured_at": dense_size,
        "dense_scaled_by": scale,
        "times_faster_than_dense": dense_seconds / whole,
        "relative_error": relative_error(parts, lowrank.weighted_sum(parts)),
    }


def many_clients(size: int, *, clients: int, rank: int) -> dict[str, Any]:
    """Time one layer of many clients."""
    parts = [(draw(size, rank, key=str(client)), 1 / clients) for client in range(clients)]
    seconds = best(lambda: lowrank.weighted_sums({"": parts}), 1)
    return {"size": size, "clients": clients, "rank": rank, "seconds": seconds, "peak_bytes": peak_bytes()}


def draw(size: int, rank: int, *, key: str) -> Factors:
    """Return factors as a client might send them: a of fresh rows, b a hundredth of that."""
    rng = generator(derive(0, "benchmark.aggregate", client=key))
    a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((rank, size), (size, rank)))
    return Factors(a=a / np.float32(np.sqrt(3 * size)), b=b / np.float32(100 * np.sqrt(size)))


def relative_error(parts: Sequence[tuple[Factors, float]], low: lowrank.LowRank) -> float:
    """Return |D x - U S Vt x| / |D x| for a random x, in float64."""
    x = generator(derive(0, "benchmark.probe")).standard_normal(low.shape[1])
    exact = sum(weight * (f.b.astype(np.float64) @ (f.a.astype(np.float64) @ x)) for f, weight in parts)
    got = low.u.astype(np.float64) @ (low.s * (low.vt.astype(np.float64) @ x))
    return float(np.linalg.norm(exact - got) / np.linalg.norm(exact))


def best(call: Callable[[], Any], repeat: int) -> float:
    """Return the shortest time of several calls, in seconds."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times)


def peak_bytes() -> int:
    """Return the process's largest resident size so far (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def report(case: str, **numbers: Any) -> None:
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in numbers.items()}
    print(json.dumps({"case": case, **rounded}), flush=True)


if __name__ == "__main__":
    main()
