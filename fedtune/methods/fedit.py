"""FedIT: the factors themselves are averaged (Zhang et al., ICASSP 2024, arXiv 2305.05644)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from fedtune.lora.adapter import Adapter, Factors, draw_a, pack, unpack
from fedtune.messages import AdmittedUpdate, Assignment, Blueprint, PlannedClient, TrainLora
from fedtune.methods.adapter_start import fill
from fedtune.methods.method import LinearMethod, end_of, join, make_assignment, move
from fedtune.methods.serialization import NOT_PERSISTED
from fedtune.methods.settings import LinearSettings, down_dtype
from fedtune.number_formats import to_wire
from fedtune.seeds import derive
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class FedItSettings(LinearSettings):
    """Settings of `fedit`."""

    name: Literal["fedit"] = "fedit"
    """Name of the method."""


@dataclass(frozen=True)
class FedItState:
    settings: FedItSettings = field(metadata=NOT_PERSISTED)
    round: int
    """Rounds completed."""
    tensors: Tensors
    """Flat factors, float32; b carries the scale."""
    saved: Tensors

    @cached_property
    def sent(self) -> Tensors:
        """The factors in wire format: one mapping for the whole cohort, so it is encoded once."""
        return to_wire(self.tensors, down_dtype(self.settings))


def init(blueprint: Blueprint, settings: FedItSettings) -> FedItState:
    """Return the first state: one A drawn for all clients, B zero."""
    return FedItState(settings=settings, round=0, tensors=shared_start(blueprint), saved=blueprint.saved)


def shared_start(blueprint: Blueprint) -> Tensors:
    """Return flat factors of the largest planned rank: A from the run's shared key, B zero."""
    # One A for all: the mean of separate draws would be smaller by the root of their number.
    key, rank = derive(blueprint.seed, "lora.shared_a"), blueprint.max_rank
    start = {
        name: Factors(a=draw_a(key, name, rank, n), b=np.zeros((m, rank), np.float32))
        for name, (m, n) in blueprint.modules.items()
    }
    return pack(start)


def start(state: FedItState, adapter: Adapter, saved: Tensors) -> FedItState:
    """Return the first state with factors that are there already; a module that they lack starts afresh."""
    return replace(state, tensors=fill(state.tensors, adapter, method="fedit"), saved={**state.saved, **saved})


def assign(state: FedItState, seed: int, planned: PlannedClient) -> Assignment:
    """Send both factors; the client trains both and returns what has changed."""
    # The key is not used: every row of A is sent.
    task = TrainLora(a_key=0, upload="difference", wire_dtype=state.settings.wire_dtype)
    return make_assignment("fedit", state, seed, planned.plan, task, {"local": state.sent})


def contribution(state: FedItState, update: AdmittedUpdate) -> Tensors:
    return join(end_of(state.tensors, update), update.lora.saved)


def current(state: FedItState) -> Tensors:
    return join(state.tensors, state.saved)


def advance(state: FedItState, mean: Tensors) -> FedItState:
    """Return the state after one round: factors move to their weighted mean."""
    tensors, saved = move(state.tensors, state.saved, mean, state.settings.server_learning_rate)
    return replace(state, round=state.round + 1, tensors=tensors, saved=saved)


def adapter(state: FedItState) -> Adapter:
    return unpack(state.tensors)


METHOD = LinearMethod(
    name="fedit",
    settings=FedItSettings,
    init=init,
    start=start,
    assign=assign,
    adapter=adapter,
    contribution=contribution,
    current=current,
    weights=lambda state: state.settings.weights,
    advance=advance,
    averages_factors=True,
    wire_dtype=lambda settings: settings.wire_dtype,
    down_dtype=down_dtype,
    why_not_pruned="a mean of factors that lack different rows and columns is up to 78 % off",
    # Factors of unequal rank have no mean; `zeropad` pads them.
    ranks="equal",
)
