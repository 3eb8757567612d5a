"""What the server's half of a round takes with the Flower strategies, beside Flower's FedAvg, and how exact the sum is.

    python benchmarks/flower_strategies.py            SmolLM2-135M's 210 layers, ten clients
    python benchmarks/flower_strategies.py --quick    two of its thirty blocks, in seconds

Prints one JSON line per case: processor seconds of `configure_train` and `aggregate_train`, the latter as a multiple of
FedAvg's in the same run, and the largest error of the sum beside a dense one in float64, as a share of its largest
number.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Strategy

from fedtune.flower import FedEx, FedIT, FlexLoRA, FLoRA, HetLoRA, shim
from fedtune.flower.lora_strategy import LoraStrategy
from fedtune.flower.peft_records import PeftState, to_record
from fedtune.lora.adapter import delta
from fedtune.seeds import derive, generator
from fedtune.tensors import Array

SHAPES = {
    "q": (576, 576),
    "k": (192, 576),
    "v": (192, 576),
    "o": (576, 576),
    "gate": (1536, 576),
    "up": (1536, 576),
    "down": (576, 1536),
}
"""(out, in) of the layers of one block of SmolLM2-135M."""
CLIENTS, ALPHA, EQUAL, MIXED = 10, 16, (16,), (4, 8, 16)
CHECKED = 14
"""Layers whose dense sum is formed."""


class Nodes(Grid):
    """Ten nodes that are there; messages to them are kept by the caller."""

    def get_node_ids(self) -> Iterable[int]:
        return range(1, CLIENTS + 1)

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        return shim.Run.create_empty(1)

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="two blocks")
    args = parser.parse_args()
    logging.getLogger("flwr").setLevel(logging.ERROR)
    shim.enter_task()
    modules = {
        f"layers.{i}.{name}": shape for i in range(2 if args.quick else args.blocks) for name, shape in SHAPES.items()
    }
    mixed = {f"node-{place}": MIXED[place % len(MIXED)] for place in range(CLIENTS)}
    base = case(FedAvg(fraction_evaluate=0.0), modules, EQUAL, {})["aggregate_s"]
    print(json.dumps({"case": "FedAvg", "ranks": list(EQUAL), "aggregate_s": base}), flush=True)
    equal: tuple[type[LoraStrategy], ...] = (FedIT, FLoRA, FlexLoRA, FedEx)
    for kind in equal:
        report(kind(alpha=ALPHA, fraction_evaluate=0.0), modules, EQUAL, base)
    unequal: tuple[type[LoraStrategy], ...] = (FLoRA, FlexLoRA, HetLoRA)
    for kind in unequal:
        report(kind(alpha=ALPHA, fraction_evaluate=0.0, ranks=mixed), modules, MIXED, base)


def report(strategy: LoraStrategy, modules: Mapping[str, tuple[int, int]], ranks: tuple[int, ...], base: float) -> None:
    exact = not isinstance(strategy, FedIT | HetLoRA)
    ends = {place: state(modules, ranks[place % len(ranks)], f"client {place}") for place in range(CLIENTS)}
    found = case(strategy, modules, ranks, ends)
    line = {"case": type(strategy).__name__, "ranks": list(ranks), **found, "times_fedavg": found["aggregate_s"] / base}
    print(json.dumps(line | ({"error": error(strategy, ends, modules)} if exact else {})), flush=True)


def case(
    strategy: Strategy, modules: Mapping[str, tuple[int, int]], ranks: tuple[int, ...], ends: Mapping[int, PeftState]
) -> dict[str, float]:
    """Time both halves of a round, over replies that are there already."""
    ends = ends or {place: state(modules, ranks[place % len(ranks)], f"client {place}") for place in range(CLIENTS)}
    first = state(modules, max(ranks), "first")
    fresh = {key: np.zeros_like(one) if key.endswith(".b") else one for key, one in first.factors.items()}
    began = time.process_time()
    arrays: ArrayRecord = to_record(PeftState(fresh, {}))
    messages = list(strategy.configure_train(1, arrays, ConfigRecord(), Nodes()))
    configured = time.process_time() - began
    replies = []
    for message in sorted(messages, key=lambda one: one.metadata.dst_node_id):
        place = message.metadata.dst_node_id - 1
        shim.stamp(message, f"message-{place}")
        metrics = MetricRecord({"num-examples": examples(place)})
        replies.append(Message(RecordDict({"arrays": to_record(ends[place]), "metrics": metrics}), reply_to=message))
    began = time.process_time()
    strategy.aggregate_train(1, replies)
    return {"configure_s": configured, "aggregate_s": time.process_time() - began}


def state(modules: Mapping[str, tuple[int, int]], rank: int, key: str) -> PeftState:
    draw, factors = generator(derive(0, "bench.flower", client=key)), dict[str, Array]()
    for name, (m, n) in modules.items():
        factors[f"{name}.a"] = (draw.standard_normal((rank, n)) / np.sqrt(n)).astype(np.float32)
        factors[f"{name}.b"] = (0.02 * draw.standard_normal((m, rank))).astype(np.float32)
    return PeftState(factors, {})


def examples(place: int) -> int:
    return 100 + 10 * place


def error(strategy: LoraStrategy, ends: Mapping[int, PeftState], modules: Mapping[str, tuple[int, int]]) -> float:
    """Return the largest error of the sum beside a dense one in float64, relative to its largest number."""
    total, worst, adapter = sum(examples(place) for place in ends), 0.0, strategy.adapter
    for name in list(modules)[:CHECKED]:
        dense = np.zeros(modules[name])
        for place, end in ends.items():
            b, a = (end.factors[f"{name}.{side}"].astype(np.float64) for side in "ba")
            dense += examples(place) / total * ALPHA / len(a) * (b @ a)
        worst = max(worst, float(np.abs(delta(adapter[name]) - dense).max() / np.abs(dense).max()))
    return worst


if __name__ == "__main__":
    main()
