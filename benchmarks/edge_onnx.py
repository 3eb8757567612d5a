"""A device's forward passes by onnxruntime beside the torch client's: time of a step, memory, slopes, replayed logits.

    python benchmarks/edge_onnx.py BASE [BASE ...] [--parts step memory slopes replay text] [--repeat 5]

Prints one JSON line per case, on one thread. Steps of the bank `kron` (p = 64, two losses of one row) are alternated
with torch's; processor time, which a busy machine changes least: the median over the repeats of the ratio to torch's
step beside it, and its spread. `scored` is the share of the row whose loss counts: 1 as in a text, .5 as in an answer.
Memory is that of a process of its own. Slopes are the differences of a step's two losses (eps 5e-4) on a text, one per
seed, against torch's in float32. Replayed logits compare w(A) after 20 rounds of 5 clients and 50 steps with the
weights that `fedtune replay` writes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import SeedLedger
from fedtune.directions.trainable import TensorSelection, trainable_ordinals
from fedtune.edge.bundle import Bundle, read_bundle
from fedtune.edge.onnx_runtime import OnnxPosition, OnnxRuntime, load, orient, square_of
from fedtune.model.base import Base
from fedtune.model.batches import Batch
from fedtune.model.kron_forward import with_injected_paths
from fedtune.model.seed_rebuild import with_rebuilt_weights
from fedtune.probing.rows import PaddedRows
from fedtune.probing.steps import Move
from fedtune.runs.edge_bundle import DTYPES, load_base, read_source, write_bundle
from fedtune.seeds import derive, generator

SEEDS, EXPONENT, AMOUNT = 4096, 26, 33_554
"""K, e and the perturbation of 5e-4 in units of 2^-e."""
LENGTHS = (32, 128)
SLOPES = 50
ROUNDS, CLIENTS, STEPS, LARGEST = 20, 5, 50, 24
"""Of the history that is replayed; a scalar of 24 wire units is three times the usual one (rms 8)."""
TEXT = (
    "A ledger is a book in which the accounts of a business are kept. Every entry has a date, a sum and a reason, and "
    "the sums on both sides of it are equal. What was written stays: a mistake is put right by another entry."
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("bases", nargs="+", help="folder of a base")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.bases:
        base = load_base(read_source(name))
        with tempfile.TemporaryDirectory() as scratch:
            bundles = dict[str, Bundle]()
            for dtype in DTYPES:
                write_bundle(base, Path(scratch) / dtype, dtype=dtype, signer=None)
                bundles[dtype] = read_bundle(Path(scratch) / dtype)
            for part in args.parts:
                PARTS[part](base, bundles, args.repeat)


def measure_steps(base: Base, bundles: Mapping[str, Bundle], repeat: int) -> None:
    ledger, moves = ledger_of(base.manifest.digest, 300), [(77, -AMOUNT), (77, AMOUNT)]
    runtimes = {dtype: load(bundle, threads=1) for dtype, bundle in bundles.items()}
    for length in LENGTHS:
        for scored in (1.0, 0.5):
            rows = random_row(base.model.config.vocab_size, length, scored)
            seconds = step_seconds(base, runtimes, ledger, rows, moves, repeat)
            ratios = {dtype: np.array(seconds[dtype]) / np.array(seconds["torch"]) for dtype in runtimes}
            report(
                "step",
                base,
                tokens=length,
                scored=scored,
                torch_ms=1e3 * float(np.median(seconds["torch"])),
                **{f"{dtype}_ms": 1e3 * float(np.median(seconds[dtype])) for dtype in runtimes},
                **{f"{dtype}_ratio": float(np.median(ratio)) for dtype, ratio in ratios.items()},
                **{f"{dtype}_spread": [float(ratio.min()), float(ratio.max())] for dtype, ratio in ratios.items()},
            )


def step_seconds(
    base: Base,
    runtimes: Mapping[str, OnnxRuntime],
    ledger: SeedLedger,
    rows: PaddedRows,
    moves: Sequence[Move],
    repeat: int,
) -> Mapping[str, Sequence[float]]:
    """Return processor seconds of a step by every way, alternated."""
    ordinals = reached(base)
    with with_injected_paths(base, ledger, ordinals) as position, torch.inference_mode():
        batch = torch_batch(rows)
        ways: dict[str, Callable[[], Any]] = {"torch": lambda: position.losses(batch, moves)}
        for dtype, runtime in runtimes.items():
            device = OnnxPosition(runtime, ledger, runtime.signs(ledger.bank, ordinals))
            ways[dtype] = partial(device.losses, rows, moves)
        for way in ways.values():
            way()
        began = time.process_time()
        ways["torch"]()
        calls = max(1, round(0.2 / (time.process_time() - began)))
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(repeat):
            for name, way in ways.items():
                began = time.process_time()
                for _ in range(calls):
                    way()
                seconds[name].append((time.process_time() - began) / calls)
    return seconds


def measure_memory(base: Base, bundles: Mapping[str, Bundle], repeat: int) -> None:
    for dtype, bundle in bundles.items():
        for length in LENGTHS:
            script = Path(__file__).with_name("edge_memory.py")
            command = [sys.executable, str(script), str(bundle.path), "--tokens", str(length)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            sizes = {path.name: path.stat().st_size for path in bundle.path.iterdir()}
            report(
                "memory",
                base,
                dtype=dtype,
                tokens=length,
                weights_mb=sizes["weights.safetensors"] / 1e6,
                graph_kb=(sizes["graph.onnx"] + sizes["head.onnx"]) / 1e3,
                **json.loads(done.stdout),
            )


def measure_slopes(base: Base, bundles: Mapping[str, Bundle], repeat: int) -> None:
    """Compare the differences of 50 steps at the base, where a run begins."""
    ids = np.array([base.tokenizer(TEXT).input_ids[:64]], np.int64)
    rows = PaddedRows(ids, np.ones_like(ids), ids, ids.size - 1, ids.size)
    ledger = ledger_of(base.manifest.digest, 0)
    seeds = generator(derive(0, "bench.seeds")).permutation(SEEDS)[:SLOPES].tolist()
    moves: list[Sequence[Move]] = [[(seed, -AMOUNT), (seed, AMOUNT)] for seed in seeds]
    with with_injected_paths(base, ledger, reached(base)) as position, torch.inference_mode():
        expected = np.array([np.diff(position.losses(torch_batch(rows), pair)) for pair in moves])[:, 0]
    for dtype, bundle in bundles.items():
        with load(bundle, threads=1).at(ledger, reached(base)) as device:
            got = np.array([np.diff(device.losses(rows, pair)) for pair in moves])[:, 0]
            noise = max(abs(float(np.diff(device.losses(rows, [(s, -34), (s, 34)]))[0])) for s in seeds)
        report(
            "slopes",
            base,
            dtype=dtype,
            seeds=SLOPES,
            tokens=ids.size,
            correlation=float(np.corrcoef(expected, got)[0, 1]),
            rms=float(np.sqrt(np.mean(expected**2))),
            rms_error=float(np.sqrt(np.mean((got - expected) ** 2))),
            largest_difference_at_5e_7=noise,
        )


def measure_replay(base: Base, bundles: Mapping[str, Bundle], repeat: int) -> None:
    """Compare logits after 20 rounds of random scalars, as large as those of a run."""
    draw = generator(derive(0, "bench.rounds"))
    sums = np.zeros(SEEDS, np.int64)
    for _ in range(ROUNDS):
        ids = draw.integers(0, SEEDS, CLIENTS * STEPS)
        np.add.at(sums, ids, draw.integers(-LARGEST, LARGEST + 1, len(ids)) * 16)
    bank = Kron(SEEDS, derive(0, "bench.bank"))
    ledger = SeedLedger(bank, EXPONENT, ROUNDS, base.manifest.digest, sums.astype(np.int32))
    ids = np.array([base.tokenizer(TEXT).input_ids[:48]], np.int64)
    with torch.inference_mode():
        plain = base.model(torch.from_numpy(ids)).logits[0].numpy()
        with with_rebuilt_weights(base, ledger, reached(base)):
            expected = base.model(torch.from_numpy(ids)).logits[0].numpy()
    runtime = load(bundles["float32"], threads=1)
    state = orient(square_of(ledger, ledger.accumulators)[None], base.transposed)
    hidden, _ = runtime.hidden(ids, state, np.arange(ids.size), runtime.signs(ledger.bank, reached(base)))
    got = runtime.logits(hidden)
    report(
        "replay",
        base,
        rounds=ROUNDS,
        largest_difference=float(np.abs(got - expected).max()),
        largest_logit=float(np.abs(expected).max()),
        moved_by=float(np.abs(plain - expected).max()),
    )


def measure_texts(base: Base, bundles: Mapping[str, Bundle], repeat: int) -> None:
    """Compare 40 greedy tokens at the base and at moved weights, and their time."""
    prompt = base.tokenizer(TEXT).input_ids[:12]
    runtime = load(bundles["float32"], threads=1)
    for size in (0, 3000):
        ledger = ledger_of(base.manifest.digest, size)
        with with_rebuilt_weights(base, ledger, reached(base)):
            began = time.process_time()
            ids = torch.tensor([prompt])
            out = base.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
            )
            torch_s = time.process_time() - began
        began = time.process_time()
        tokens = list(runtime.continue_tokens(ledger, reached(base), prompt, new_tokens=40))
        expected = out[0, len(prompt) :].tolist()
        report(
            "text",
            base,
            moved=size > 0,
            tokens=len(tokens),
            same=tokens == expected[: len(tokens)] and len(expected) - len(tokens) <= 1,
            onnx_s=time.process_time() - began,
            torch_s=torch_s,
        )


def ledger_of(digest: bytes, largest: int) -> SeedLedger:
    sums = generator(derive(0, "bench.sums")).integers(-largest, largest + 1, SEEDS).astype(np.int32)
    return SeedLedger(Kron(SEEDS, derive(0, "bench.bank")), EXPONENT, 3, digest, sums)


def reached(base: Base) -> Sequence[int]:
    return trainable_ordinals(base.manifest, TensorSelection("kron"), base.matrices)


def random_row(vocabulary: int, length: int, scored: float) -> PaddedRows:
    ids = generator(derive(0, "bench.row")).integers(3, vocabulary, (1, length))
    labels = ids.copy()
    labels[:, : round(length * (1 - scored))] = -100
    return PaddedRows(ids, np.ones_like(ids), labels, int((labels[:, 1:] != -100).sum()), length)


def torch_batch(rows: PaddedRows) -> Batch:
    ids, mask, labels = (torch.from_numpy(array) for array in (rows.input_ids, rows.attention_mask, rows.labels))
    return Batch(ids, mask, labels, rows.count, rows.tokens)


def report(what: str, base: Base, **numbers: Any) -> None:
    rounded = {key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in numbers.items()}
    print(json.dumps({"what": what, "base": Path(base.name).name[:24], **rounded}), flush=True)


PARTS: Mapping[str, Callable[[Base, Mapping[str, Bundle], int], None]] = {
    "step": measure_steps,
    "memory": measure_memory,
    "slopes": measure_slopes,
    "replay": measure_replay,
    "text": measure_texts,
}

if __name__ == "__main__":
    main()
