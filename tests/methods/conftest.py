from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from fedtune.lora.adapter import Adapter, Factors, draw_a, pack
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
from fedtune.methods.method import Method, end_of
from fedtune.number_formats import from_wire, to_wire
from fedtune.seeds import derive, generator
from fedtune.tensors import Array

Member = tuple[str, int, float, int]
"""(name, rank, scale, examples)"""


@dataclass(frozen=True)
class Federation:
    """Clients that follow the assignment as `TrainLora` describes it, in numpy, and move their factors at random."""

    blueprint: Blueprint

    def state(self, method: Method[Any], **settings: Any) -> Any:
        """Return the first state; flora exact and in the paper's mode, whose updates are factors like all others'."""
        paper = {"mode": "reinit", "state_max_rank": "exact"} if method.name == "flora" else {}
        plain = {"wire_dtype": "fp32"} | paper
        return method.init(self.blueprint, method.settings(**plain | settings))

    def assign(self, method: Method[Any], state: Any, member: Member) -> Assignment:
        name, rank, scale, _ = member
        plan = Plan(client=name, rank=rank, scale=scale, training=Training(batch=1, learning_rate=1.0, steps=1))
        return method.assign(state, self.blueprint.seed, PlannedClient(plan))

    def start(self, assignment: Assignment) -> Adapter:
        """The local adapter before training; b carries the scale."""
        sent, ranks = from_wire(assignment.lora.blobs.get("local", {})), assignment.plan.rank_of(self.blueprint.modules)
        started = {}
        for name, rank in ranks.items():
            m, n = self.blueprint.modules[name]
            a, b = draw_a(assignment.lora.a_key, name, rank, n), np.zeros((m, rank), np.float32)
            if f"{name}.a" in sent:
                a[: len(sent[f"{name}.a"])] = sent[f"{name}.a"]
            if f"{name}.b" in sent:
                b[:, : sent[f"{name}.b"].shape[1]] = sent[f"{name}.b"]
            started[name] = Factors(a=a, b=b)
        return started

    def end(self, assignment: Assignment, *, size: float) -> Adapter:
        """The local adapter after training: every trained entry has moved by a normal number times `size`."""
        rng = generator(derive(assignment.seed, "test.train"))
        trained = {}
        for name, factors in self.start(assignment).items():
            db, da = (rng.standard_normal(f.shape).astype(np.float32) for f in (factors.b, factors.a))
            still = assignment.lora.train == "b"
            trained[name] = Factors(
                a=factors.a if still else factors.a + np.float32(size) * da, b=factors.b + np.float32(size) * db
            )
        return trained

    def answer(self, assignment: Assignment, *, size: float = 0.1, examples: int = 1) -> AdmittedUpdate:
        start, end = self.start(assignment), self.end(assignment, size=size)
        if assignment.lora.upload == "difference":
            end = {name: Factors(a=f.a - start[name].a, b=f.b - start[name].b) for name, f in end.items()}
        task = assignment.lora
        trained = {k: t for k, t in pack(end).items() if k[-1] in task.train}
        tensors = from_wire(to_wire(trained, task.wire_dtype, key=assignment.seed))
        saved = {name: value + np.float32(examples) for name, value in task.blobs.get("saved", {}).items()}
        result = LoraResult(tensors, saved, assignment.base)
        update = ClientUpdate(assignment.plan.client, assignment.round, examples, result)
        return AdmittedUpdate(update, upload=task.upload)

    def whole(self, assignment: Assignment, update: AdmittedUpdate) -> AdmittedUpdate:
        """The same update with whole factors: what has changed says nothing without the start, which a name decides."""
        tensors = end_of(pack(self.start(assignment)), update)
        result = replace(update.lora, tensors=tensors)
        return replace(update, update=replace(update.update, result=result), upload="factors")

    def round(self, method: Method[Any], state: Any, fleet: Sequence[Member], *, size: float = 0.1) -> Any:
        return method.aggregate(state, self.updates(method, state, fleet, size=size))

    def updates(
        self, method: Method[Any], state: Any, fleet: Sequence[Member], *, size: float = 0.1
    ) -> list[AdmittedUpdate]:
        return [self.answer(self.assign(method, state, member), size=size, examples=member[3]) for member in fleet]

    def frozen(self, assignment: Assignment, name: str) -> Array:
        """The dense change of the blob `global`."""
        blob = from_wire(assignment.lora.blobs.get("global", {}))
        sent = {key: tensor.astype(np.float64) for key, tensor in blob.items()}
        if f"{name}.w" in sent:
            return sent[f"{name}.w"]
        if f"{name}.a" in sent:
            product: Array = sent[f"{name}.b"] @ sent[f"{name}.a"]
            return product
        return np.zeros(self.blueprint.modules[name])

    def mean(self, method: Method[Any], state: Any, fleet: Sequence[Member], name: str, *, size: float = 0.1) -> Array:
        """sum of p_k b_k a_k at the end of training, dense, without what is frozen."""
        total = sum(member[3] for member in fleet)
        ends = [(self.end(self.assign(method, state, member), size=size)[name], member[3]) for member in fleet]
        dense = [(n / total) * (f.b.astype(np.float64) @ f.a.astype(np.float64)) for f, n in ends]
        return np.sum(dense, axis=0)  # type: ignore[no-any-return]


class Federate:
    """Makes federations; the fixture's value."""

    def __call__(
        self,
        modules: Mapping[str, tuple[int, int]],
        *,
        max_rank: int,
        saved: Mapping[str, Array] | None = None,
        seed: int = 0,
    ) -> Federation:
        return Federation(Blueprint(modules=modules, saved=saved or {}, max_rank=max_rank, seed=seed))

    @staticmethod
    def fleet(ranks: Sequence[int], *, seed: int, rslora: bool = False) -> list[Member]:
        """One client per rank, of random alpha and size."""
        rng = generator(derive(seed, "test.fleet"))
        return [
            (f"c{i:02d}", rank, float(rng.uniform(1, 16) / (rank**0.5 if rslora else rank)), int(rng.integers(1, 100)))
            for i, rank in enumerate(ranks)
        ]

    @staticmethod
    def update(client: str, adapter: Adapter, *, examples: int, round: int = 1) -> AdmittedUpdate:
        return AdmittedUpdate(ClientUpdate(client, round, examples, LoraResult(pack(adapter))))

    @staticmethod
    def close(got: Array, expected: Array, *, relative: float = 1e-6) -> bool:
        """Whether two matrices differ by at most `relative` of the expected one's norm."""
        return bool(np.linalg.norm(got - expected) <= relative * np.linalg.norm(expected) + 1e-12)


@pytest.fixture(scope="session")
def federate() -> Federate:
    return Federate()


@pytest.fixture(scope="session")
def two_ranks() -> list[AdmittedUpdate]:
    """Two clients of ranks 1 and 2, p = 1/4 and 3/4, scales 2 and 1/2 folded in: the worked example.

    Their exact mean is D = [.5 .75 -.5; 1.75 .75 -.25], of singular values 2.101334 and 0.578270.
    """
    b1, a1 = np.array([[1.0], [2.0]], np.float32), np.array([[1.0, 0.0, -1.0]], np.float32)
    b2, a2 = np.diag(np.array([1.0, 2.0], np.float32)), np.array([[0, 2, 0], [1, 1, 1]], np.float32)
    return [
        Federate.update("first", {"m": Factors(a=a1, b=2 * b1)}, examples=1),
        Federate.update("second", {"m": Factors(a=a2, b=b2 / 2)}, examples=3),
    ]
