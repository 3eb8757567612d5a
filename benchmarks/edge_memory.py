"""Memory of a device's own process, without torch: before the weights, with them, at most in a step, and after it.

    python benchmarks/edge_memory.py BUNDLE [--tokens 128]

Prints one JSON line, in MB as Linux counts resident memory; `edge_onnx.py` calls it. Weights are mapped and packed for
their products, so both copies are resident while they are read. A step has two losses of one row of this length.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.edge.bundle import read_bundle
from fedtune.edge.runtime import load_runtime
from fedtune.probing.rows import PaddedRows

SEEDS, EXPONENT, AMOUNT = 4096, 26, 33_554
"""K, e and the perturbation of 5e-4 in units of 2^-e."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", type=int, default=128)
    args = parser.parse_args()
    bundle = read_bundle(args.bundle)
    idle, began = status("VmRSS"), time.process_time()
    runtime = load_runtime(bundle, threads=1)
    loading, loaded = time.process_time() - began, status("VmRSS")
    ordinals = trainable_ordinals(bundle.manifest, TensorSelection("kron"), bundle.facts.layers)
    ledger = SeedLedger(Kron(SEEDS, 1), EXPONENT, 0, bundle.manifest.digest, np.zeros(SEEDS, np.int32))
    ids = np.arange(args.tokens, dtype=np.int64)[None] % bundle.facts.vocabulary
    rows = PaddedRows(ids, np.ones_like(ids), ids, ids.size - 1, ids.size)
    with runtime.at(ledger, ordinals) as position:
        for seed in range(3):
            position.losses(rows, [(seed, -AMOUNT), (seed, AMOUNT)])
    sizes = {"idle_mb": idle, "loaded_mb": loaded, "peak_mb": status("VmHWM"), "after_mb": status("VmRSS")}
    print(json.dumps({**{name: round(size) for name, size in sizes.items()}, "load_s": round(loading, 2)}))


def status(key: str) -> float:
    """Return a size of this process in MB, as Linux counts it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(key))


if __name__ == "__main__":
    main()
