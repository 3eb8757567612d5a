"""FedIT: the factors themselves are averaged (Zhang et al., ICASSP 2024, arXiv 2305.05644)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import numpy as np
from annotated_types import Gt

from fedtune.adapter import Adapter, Factors, draw_a, pack, unpack
from fedtune.methods.method import linear
from fedtune.round import Assignment, Blueprint, ClientUpdate, LocalAdapter, Plan, Weighting, WireDtype
from fedtune.seeds import derive
from fedtune.tensors import Tensors, cast


@dataclass(frozen=True)
class FedItSettings:
    """Settings of `fedit`."""

    name: Literal["fedit"] = "fedit"
    server_learning_rate: Annotated[float, Gt(0)] = 1.0
    """Step from the old factors towards the clients' mean; 1 takes the mean."""
    weights: Weighting = "examples"
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


def init(blueprint: Blueprint, settings: FedItSettings) -> FedItState:
    """Return the first state: one A drawn for everybody, B zero."""
    key = derive(blueprint.seed, "lora.shared_a")
    start = {
        name: Factors(a=draw_a(key, name, blueprint.max_rank, n), b=np.zeros((m, blueprint.max_rank), np.float32))
        for name, (m, n) in blueprint.modules.items()
    }
    return FedItState(settings=settings, round=0, tensors=pack(start), saved=blueprint.saved)


def assign(state: FedItState, seed: int, plan: Plan) -> Assignment:
    """Send both factors; the client trains and returns both."""
    return Assignment(
        method="fedit",
        round=state.round + 1,
        seed=derive(seed, "client", state.round + 1, plan.client),
        plan=plan,
        local=LocalAdapter(a_key=0, wire_dtype=state.settings.wire_dtype),
        blobs={"local": cast(state.tensors, state.settings.wire_dtype), "saved": state.saved},
    )


def advance(state: FedItState, mean: Tensors) -> FedItState:
    """Return the state after one round: factors move to their weighted mean."""
    rate = np.float32(state.settings.server_learning_rate)
    old = joined(state)
    new = {name: old[name] + rate * (mean[name] - old[name]) for name in old}
    return replace(
        state,
        round=state.round + 1,
        tensors={name: new[f"local/{name}"] for name in state.tensors},
        saved={name: new[f"saved/{name}"] for name in state.saved},
    )


def contribution(state: FedItState, update: ClientUpdate) -> Tensors:
    return {f"local/{name}": t for name, t in update.tensors.items()} | {
        f"saved/{name}": t for name, t in update.saved.items()
    }


def joined(state: FedItState) -> Tensors:
    return {f"local/{name}": t for name, t in state.tensors.items()} | {
        f"saved/{name}": t for name, t in state.saved.items()
    }


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
