"""FedIT: the factors themselves are averaged (Zhang et al., ICASSP 2024, arXiv 2305.05644)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt

from fedtune.lora.adapter import Adapter, Factors, draw_a, pack, unpack
from fedtune.messages import AdmittedUpdate, Assignment, Blueprint, PlannedClient, TrainLora, Weighting, WireDtype
from fedtune.methods.method import join, linear, make_assignment, move
from fedtune.seeds import derive
from fedtune.tensors import Tensors, cast


@dataclass(frozen=True)
class FedItSettings:
    """Settings of `fedit`."""

    name: Literal["fedit"] = "fedit"
    """Name of the method."""
    server_learning_rate: Annotated[float, Gt(0)] = 1.0
    """Step from the old factors towards the clients' mean; 1 takes the mean."""
    weights: Weighting = "examples"
    """`examples`: a client counts in proportion to its training examples; `uniform`: all clients count the same."""
    wire_dtype: WireDtype = "bf16"
    """Number format of the factors, down and up."""


@dataclass(frozen=True)
class FedItState:
    settings: FedItSettings
    round: int
    """Rounds completed."""
    tensors: Tensors
    """Flat factors, float32; b carries the scale."""
    saved: Tensors

    @cached_property
    def sent(self) -> Tensors:
        """The factors in wire format: one mapping for the whole cohort, so it is encoded once."""
        return cast(self.tensors, self.settings.wire_dtype)


def init(blueprint: Blueprint, settings: FedItSettings) -> FedItState:
    """Return the first state: one A drawn for everybody, B zero."""
    return FedItState(settings=settings, round=0, tensors=shared_start(blueprint), saved=blueprint.saved)


def shared_start(blueprint: Blueprint) -> Tensors:
    """Return flat factors of the largest planned rank: A from the run's shared key, B zero."""
    key, rank = derive(blueprint.seed, "lora.shared_a"), blueprint.max_rank
    start = {
        name: Factors(a=draw_a(key, name, rank, n), b=np.zeros((m, rank), np.float32))
        for name, (m, n) in blueprint.modules.items()
    }
    return pack(start)


def assign(state: FedItState, seed: int, planned: PlannedClient) -> Assignment:
    """Send both factors; the client trains and returns both."""
    task = TrainLora(a_key=0, wire_dtype=state.settings.wire_dtype)  # the key is idle: every row of A is sent
    return make_assignment("fedit", state, seed, planned.plan, task, {"local": state.sent})


def contribution(state: FedItState, update: AdmittedUpdate) -> Tensors:
    return join(update.lora.tensors, update.lora.saved)


def advance(state: FedItState, mean: Tensors) -> FedItState:
    """Return the state after one round: factors move to their weighted mean."""
    tensors, saved = move(state.tensors, state.saved, mean, state.settings.server_learning_rate)
    return replace(state, round=state.round + 1, tensors=tensors, saved=saved)


def adapter(state: FedItState) -> Adapter:
    return unpack(state.tensors)


METHOD = linear(
    name="fedit",
    settings=FedItSettings,
    init=init,
    assign=assign,
    contribution=contribution,
    advance=advance,
    weights=lambda state: state.settings.weights,
    adapter=adapter,
    ranks="equal",
)
