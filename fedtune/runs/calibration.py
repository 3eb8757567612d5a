"""This machine in ten seconds: real steps at two batch sizes, their time and memory, beside what was predicted."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedtune.config import planned_training
from fedtune.data.encode import Example
from fedtune.devices.cost import Work, flops_per_token, sizes
from fedtune.devices.memory import HEAP, Footprint, memory
from fedtune.messages import Plan, Training, TrainLora
from fedtune.model.libraries import threads
from fedtune.model.lora import start, with_adapters
from fedtune.model.machine import forget_peak, peak_bytes, resident_bytes
from fedtune.model.train import train, uses_autocast
from fedtune.planning.policy import Arm
from fedtune.runs.fleet import Fleet
from fedtune.runs.local import Experiment

SECONDS = 8.0
"""For the steps of both sizes together; loading the base comes before."""
PRODUCT = 1024
"""Side of the matrices that are multiplied."""


@dataclass(frozen=True)
class Calibration:
    """What this machine does with a recipe's client, and what was predicted of it."""

    client: str
    step_s: float
    """Seconds of a step beside its operations."""
    s_per_tflop: float
    """Seconds for 1e12 operations of a step."""
    product_s_per_tflop: float
    """The same of a plain matrix product."""
    heap: float
    """Memory taken for each byte of tensors that come and go; see `devices.memory.HEAP`."""
    runtime_bytes: float
    """Of interpreter and libraries, and the data."""
    steps: Sequence[Mapping[str, float]]
    """By size: rows, seconds of a step, `peak_bytes`, and as predicted before: `predicted_bytes`."""

    def seconds(self, tflop: float, steps: int) -> float:
        """Return the seconds of some steps of so many operations in all."""
        return steps * self.step_s + tflop * self.s_per_tflop

    def as_json(self) -> Mapping[str, Any]:
        return asdict(self)


def calibrate(experiment: Experiment) -> Calibration:
    """Train the client with the longest example for some seconds, at its batch and at half of it, for nothing.

    Weights and data are as before afterwards.
    """
    fleet, recipe, base = experiment.devices, experiment.recipe, experiment.base
    shards = experiment.federation.clients
    client = max(sorted(shards), key=lambda name: max((len(e.input_ids) for e in shards[name].train), default=0))
    examples = sorted(shards[client].train, key=lambda example: -len(example.input_ids))
    rank, training = planned_training(recipe, client)
    gc.collect()
    whole = max(1, training.batch)
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    first = resident_bytes() - weights
    measured: list[Mapping[str, float]] = []
    with threads(recipe.model.threads):
        product = product_s_per_tflop()
        for rows in sorted({max(1, whole // 2), whole}):
            tried = replace(training, batch=rows, accumulation=1, steps=1, epochs=None)
            measured.append(one_size(experiment, client, examples, tried, rank, SECONDS / 2))
    footprint = fleet.footprint(client, Arm(0.0, rank), replace(training, steps=1, epochs=None))
    footprint = replace(footprint, global_rank=0.0, device="cpu", runtime=first)
    return fit(fleet, client, rank, measured, footprint, product)


def fit(
    fleet: Fleet,
    client: str,
    rank: int,
    measured: Sequence[Mapping[str, float]],
    footprint: Footprint,
    product: float,
) -> Calibration:
    """Return what two sizes of batches, or one, say of this machine; of a base with a cost model."""
    body, steps = fleet.body, list[Mapping[str, float]]()
    assert body is not None
    flops, heap, size = list[float](), HEAP["cpu"], sizes(body.layout, None, 0.0)
    for taken in measured:
        own = replace(footprint, rows=int(taken["rows"]), longest=taken["longest"], mean=taken["mean"])
        parts = memory(body, None, replace(own, heap=1.0))
        moving = parts.activations + parts.logits
        if taken["peak_bytes"]:  # the larger size's in the end
            heap = min(3.0, max(1.0, (taken["peak_bytes"] - parts.total + moving) / moving))
        steps.append({**taken, "predicted_bytes": memory(body, None, own).total})
        work = Work(steps=1, rows=own.rows, passes=1, tokens=own.mean, longest=own.longest)
        flops.append(flops_per_token(body, size, rank, work) * taken["tokens"] / 1e12)
    slope, fixed = measured[-1]["seconds"] / flops[-1], 0.0
    if flops[-1] > 1.2 * flops[0]:
        fitted = (measured[-1]["seconds"] - measured[0]["seconds"]) / (flops[-1] - flops[0])
        # Two noisy times may lie on a line that begins below zero.
        if 0 < fitted <= slope:
            slope, fixed = fitted, measured[-1]["seconds"] - fitted * flops[-1]
    assert footprint.runtime is not None
    return Calibration(client, fixed, slope, product, heap, footprint.runtime, steps)


def one_size(
    experiment: Experiment,
    client: str,
    examples: Sequence[Example],
    training: Training,
    rank: int,
    seconds: float,
) -> Mapping[str, float]:
    """Return rows, tokens, seconds of a step and peak memory of steps on the longest examples."""
    base, rows = experiment.base, list(examples[: training.batch])
    plan = Plan(client, rank, 1.0, training)
    adapter = start(TrainLora(a_key=1), plan, base.modules)
    saved = base.saved_tensors()
    peaks_begin = forget_peak()
    times = list[float]()
    with with_adapters(base, local=adapter, scale=1.0, saved=saved, half=uses_autocast(training, base.device)):
        began = time.perf_counter()
        while not times or (time.perf_counter() - began < seconds and len(times) < 12):
            # At a rate that moves nothing one could see: the values are thrown away.
            still = replace(training, learning_rate=1e-12, steps=2 if not times else 1)
            step = time.perf_counter()
            train(base, rows, still, key=1, client=client)
            times.append((time.perf_counter() - step) / (still.steps or 1))
    lengths = [len(example.input_ids) for example in rows]
    return {
        "rows": float(len(rows)),
        "tokens": float(sum(lengths)),
        "mean": sum(lengths) / len(lengths),
        "longest": float(max(lengths)),
        "seconds": sorted(times)[len(times) // 2],
        "peak_bytes": float(peak_bytes()) if peaks_begin else 0.0,
    }


def product_s_per_tflop() -> float:
    """Return the seconds of 1e12 operations of a matrix product in float32 on this processor, the fastest of three."""
    a, times = np.ones((PRODUCT, PRODUCT), np.float32), list[float]()
    for _ in range(3):
        began = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - began)
    return min(times) / (2 * PRODUCT**3 / 1e12)
