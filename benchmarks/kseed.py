"""What FedKSeed costs: a model rebuilt from K integers, each bank and way, beside the published loop and a copy.

    python benchmarks/kseed.py rebuild --parameters 2e8

Prints one JSON line per case, on one core. Times are the best of several, scaled to 10^9 parameters; a slow way is
measured on a slice, whose size stands in its line. The published loop draws one normal tensor per seed and adds it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from fedtune.directions import torch_rebuild
from fedtune.directions.bank import DirectionBank
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.rebuild import rebuild
from fedtune.seeds import derive, generator
from fedtune.tensors import Array

BILLION = 10**9
WIDTH = 4096
EXPONENT = 26


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="what to measure; everything without it")
    parser.add_argument("--parameters", type=float, default=1e8, help="size of the tensor that is rebuilt")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for part in args.parts or PARTS:
        PARTS[part](int(args.parameters), args.repeat)


def rebuilds(parameters: int, repeat: int) -> None:
    """Rebuild one bfloat16 matrix of the size asked for."""
    base = torch.full((parameters // WIDTH, WIDTH), 0.02, dtype=torch.bfloat16)
    result = torch.empty_like(base)
    floor = per_billion(lambda: result.copy_(base), base.numel(), repeat)
    report("copy", seconds_per_billion=floor, measured_at=base.numel())
    loops = {size: loop(2**22, size) for size in (1024, 4096)}
    for size, seconds in loops.items():
        report("published loop", seeds=size, seconds_per_billion=seconds, measured_at=2**22, seeds_measured=SEEDS)
    for bank in (Hadamard(4096, KEY), Hadamard(1024, KEY), Kron(4096, KEY), Gaussian(1024, KEY), Gaussian(4096, KEY)):
        for way, rewrite in WAYS.items():
            slow = isinstance(bank, Gaussian)
            rows = min(len(base), SLICES[way, slow] // WIDTH)
            if not rows:
                continue
            sums = accumulators(bank)
            call = rewriting(rewrite, base[:rows], result[:rows], sums, bank)
            call()  # compiles, and draws what is drawn once
            seconds = per_billion(call, rows * WIDTH, 1 if slow else repeat)
            report(
                "rebuild",
                bank=bank.name,
                seeds=bank.size,
                way=way,
                seconds_per_billion=seconds,
                times_faster_than_loop=loops[bank.size] / seconds,
                times_slower_than_copy=seconds / floor,
                measured_at=rows * WIDTH,
            )


SEEDS = 8
KEY = derive(0, "fedkseed.bank")


def by_numpy(tensor: torch.Tensor, sums: Array, *, out: torch.Tensor, **named: Any) -> None:
    rebuild(torch_rebuild.as_array(tensor), sums, out=torch_rebuild.as_array(out), **named)


WAYS: Mapping[str, Callable[..., Any]] = {
    "numba": torch_rebuild.compiled,
    "torch": torch_rebuild.rebuild,
    "numpy": by_numpy,
}
SLICES: Mapping[tuple[str, bool], int] = {
    ("numba", False): 2**40,
    ("torch", False): 2**26,
    ("numpy", False): 2**24,
    ("numba", True): 2**18,
    ("torch", True): 0,  # draws every word by tensor operations: seconds for one block
    ("numpy", True): 2**14,
}
"""Parameters at which a way is measured at most, by whether the bank draws for each direction."""


def loop(parameters: int, seeds: int) -> float:
    """Return the seconds that a rebuild takes which draws each direction with torch, for 10^9 parameters."""
    weights = torch.zeros(parameters)
    draw = torch.Generator()

    def some() -> None:
        for seed in range(SEEDS):
            draw.manual_seed(seed)
            weights.sub_(torch.normal(0.0, 1.0, weights.shape, generator=draw), alpha=1e-6)

    return per_billion(some, parameters, 2) * seeds / SEEDS


def rewriting(
    way: Callable[..., Any], base: torch.Tensor, result: torch.Tensor, sums: Array, bank: DirectionBank
) -> Callable[[], Any]:
    return lambda: way(base, sums, bank=bank, ordinal=0, exponent=EXPONENT, out=result)


def accumulators(bank: DirectionBank) -> Array:
    """Return sums as after some rounds, all below 2^24 together."""
    return generator(KEY).integers(-1000, 1000, bank.size).astype(np.int32)


def per_billion(call: Callable[[], Any], parameters: int, repeat: int) -> float:
    """Return the shortest time of several calls, in seconds, scaled to 10^9 parameters."""
    times = []
    for _ in range(repeat):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return min(times) * BILLION / parameters


def report(case: str, **numbers: Any) -> None:
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in numbers.items()}
    print(json.dumps({"case": case, **rounded}), flush=True)


PARTS: Mapping[str, Callable[[int, int], None]] = {"rebuild": rebuilds}


if __name__ == "__main__":
    main()
