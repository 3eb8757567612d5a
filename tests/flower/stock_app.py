"""Clients that know nothing of fedtune: the app of docs/how-to/flower-strategies.md, and some that only use numpy."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Error, Message, MetricRecord, RecordDict

from fedtune.flower.frozen_change import DIGEST, FROZEN, digest
from fedtune.flower.peft_records import PeftState, from_record, to_record
from fedtune.tensors import Array
from tests.flower.conftest import NODE, MemoryGrid, Node

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "flower-strategies.md"
LAYERS = {"m.q": (12, 10), "m.v": (9, 10)}
"""(out, in) of the numpy clients' modules."""
Reply = Callable[[PeftState, Message], RecordDict | Error | None]
"""From what a client has trained, and its message, to its reply."""


def blocks() -> Mapping[str, str]:
    """Return the page's code by the title of its block."""
    titled = re.findall(r'```\w+ title="([\w.]+)"\n(.*?)```', PAGE.read_text(), flags=re.DOTALL)
    assert {name for name, _ in titled} == {"server_app.py", "client_app.py", "task.py", "pyproject.toml"}
    return dict(titled)


def write_app(folder: Path, changes: Sequence[tuple[str, str]] = ()) -> Path:
    """Write the page's app into a folder, with some of its texts replaced by others."""
    package = folder / "stories"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    texts = blocks()
    for old, new in changes:
        assert any(old in text for text in texts.values()), old
        texts = {name: text.replace(old, new) for name, text in texts.items()}
    for name, text in texts.items():
        (folder / name if name.endswith(".toml") else package / name).write_text(text)
    return folder


@contextmanager
def imported(folder: Path) -> Iterator[Mapping[str, ModuleType]]:
    """Import the app that lies in a folder, and forget it again."""
    sys.path.insert(0, str(folder))
    try:
        yield {name: importlib.import_module(f"stories.{name}") for name in ("task", "client_app", "server_app")}
    finally:
        sys.path.remove(str(folder))
        for name in [name for name in sys.modules if name.partition(".")[0] == "stories"]:
            del sys.modules[name]


def first_state(rank: int, *, seed: int = 9, trained: bool = False) -> PeftState:
    """Return a fresh PEFT state; `trained`: with a b that is not zero."""
    draw, factors = np.random.default_rng(seed), dict[str, Array]()
    for name, (m, n) in LAYERS.items():
        factors[f"{name}.a"] = draw.standard_normal((rank, n)).astype(np.float32)
        b = draw.standard_normal((m, rank)) if trained else np.zeros((m, rank))
        factors[f"{name}.b"] = b.astype(np.float32)
    return PeftState(factors, {})


def answer(state: PeftState, examples: float = 1, **metrics: float) -> RecordDict:
    """Return a reply as Flower's examples write it."""
    numbers: dict[str, Any] = {"num-examples": examples, "train_loss": 0.5, **metrics}
    return RecordDict({"arrays": to_record(state), "metrics": MetricRecord(numbers)})


class NumpyClient:
    """A client that moves its factors by a seeded step, and notes what it was sent and what it has replied."""

    def __init__(
        self, seed: int, *, rank: int = 0, examples: int = 1, train_a: bool = True, reply: Reply | None = None
    ):
        """Keep what it does; a `rank` of its own is used where it is sent no factors."""
        self.seed, self.rank, self.examples, self.train_a, self.reply = seed, rank, examples, train_a, reply
        self.got, self.sent = list[PeftState](), list[PeftState]()
        self.frozen, self.configs = list[ArrayRecord | None](), list[Mapping[str, Any]]()

    def __call__(self, message: Message) -> RecordDict | Error | None:
        """Answer a message, of training or of evaluation."""
        content = message.content
        if message.metadata.message_type == "evaluate":
            return RecordDict({"metrics": MetricRecord({"eval_loss": float(self.seed), "num-examples": self.examples})})
        state, draw = from_record(content.array_records["arrays"]), np.random.default_rng([self.seed, len(self.got)])
        frozen = content.array_records.get(FROZEN)
        self.got.append(state)
        self.frozen.append(frozen)
        self.configs.append(dict(content.config_records["config"]))
        start = state if state.factors else first_state(self.rank, seed=self.seed)
        moved = {
            key: array + np.float32(0.1) * draw.standard_normal(array.shape).astype(np.float32)
            if self.train_a or key.endswith(".b")
            else array
            for key, array in start.factors.items()
        }
        self.sent.append(PeftState(moved, {}))
        if self.reply is not None:
            return self.reply(self.sent[-1], message)
        metrics = {DIGEST: digest(frozen)} if frozen else {}
        return answer(self.sent[-1], self.examples, **metrics)


def grid_of(*clients: Node) -> MemoryGrid:
    """Return a grid of clients, on nodes of large ids in their order."""
    return MemoryGrid({NODE + place: client for place, client in enumerate(clients)})


def delta_of(state: PeftState, name: str, scale: float) -> Array:
    """Return what a PEFT state changes in a layer, dense and in float64."""
    b, a = (state.factors[f"{name}.{side}"].astype(np.float64) for side in "ba")
    product: Array = scale * (b @ a)
    return product


def record_delta(record: ArrayRecord | None, name: str) -> Array:
    """Return what a frozen record changes in a layer, dense and in float64; zero of none."""
    m, n = LAYERS[name]
    if not record:
        return np.zeros((m, n))
    prefix = f"base_model.model.{name}"
    if f"{prefix}.w" in record:
        dense: Array = record[f"{prefix}.w"].numpy().astype(np.float64)
        return dense
    a, b = (record[f"{prefix}.{side}"].numpy().astype(np.float64) for side in "ab")
    product: Array = b @ a
    return product
