"""What a projection on all directions costs beside a rebuild of the same weights, and a rebuild of several banks.

    python benchmarks/kseed_projection.py --parameters 3e7

Prints one JSON line per case, on one core: processor time, the median of pairs that were measured in turn. A projection
of a gradient gives the slopes along all directions; a rebuild of B banks adds up B times as many directions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from fedtune.directions import rebuild_torch
from fedtune.directions.bank import DirectionBank
from fedtune.directions.projection_torch import project
from fedtune.directions.space import Grouped, directions
from fedtune.seeds import derive, generator

WIDTH = 4096
EXPONENT = 26
KEYS = [derive(0, "fedkseed.bank", number) for number in range(8)]
BANKS: Mapping[str, DirectionBank] = {
    "hadamard": directions("hadamard", 4096, KEYS[:1]),
    "hadamard, 16 groups": directions("hadamard", 4096, KEYS[:1], 16),
    "hadamard, 1024 seeds": directions("hadamard", 1024, KEYS[:1]),
    "hadamard, 2 banks": directions("hadamard", 4096, KEYS[:2]),
    "hadamard, 8 banks": directions("hadamard", 4096, KEYS[:8]),
    "kron, 64 seeds a matrix": directions("kron", 64, KEYS[:1], "tensor", [0]),
    "kron": directions("kron", 4096, KEYS[:1]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parameters", type=float, default=3e7, help="size of the matrix")
    parser.add_argument("--repeat", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = int(args.parameters) // WIDTH
    gradient = torch.from_numpy(generator(1).standard_normal((rows, WIDTH), np.float32))
    weights = torch.empty_like(gradient)
    for name, bank in BANKS.items():
        sums = generator(2).integers(-500, 500, bank.size).astype(np.int32)
        for way, rebuild, transform in (
            ("as installed", rebuild_torch.fastest(gradient.device), project),
            ("torch", rebuild_torch.rebuild, project_by_torch),
        ):
            calls: Mapping[str, Callable[[], Any]] = {
                "rebuild": partial(rebuild, gradient, sums, bank=bank, ordinal=0, exponent=EXPONENT, out=weights),
                "projection": partial(transform, bank, gradient, 0),
            }
            times = in_turn(calls, args.repeat)
            ratios = [b / a for a, b in zip(times["rebuild"], times["projection"], strict=True)]
            nanoseconds = {f"{kind}_ns_a_weight": 1e9 * median(part) / gradient.numel() for kind, part in times.items()}
            report(name, bank, way, nanoseconds, ratios, gradient.numel())


def project_by_torch(bank: DirectionBank, gradient: torch.Tensor, ordinal: int) -> torch.Tensor:
    """Project as where numba is not installed."""
    with patch("importlib.util.find_spec", lambda name: None):
        return project(bank, gradient, ordinal)


def in_turn(calls: Mapping[str, Callable[[], Any]], repeat: int) -> Mapping[str, list[float]]:
    """Return the processor times of calls that are made one after the other, again and again."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeat + 1):
        for name, call in calls.items():
            began = time.process_time()
            call()
            if turn:  # the first one compiles
                times[name].append(time.process_time() - began)
    return times


def report(
    name: str,
    bank: DirectionBank,
    way: str,
    nanoseconds: Mapping[str, float],
    ratios: list[float],
    parameters: int,
) -> None:
    numbers = {**nanoseconds, "projection_over_rebuild": median(ratios), "least": min(ratios), "most": max(ratios)}
    facts = {
        "case": name,
        "way": way,
        "banks": len(bank.banks) if isinstance(bank, Grouped) else 1,
        "numbers": bank.size,
        "parameters": parameters,
        **{key: float(f"{value:.4g}") for key, value in numbers.items()},
    }
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
