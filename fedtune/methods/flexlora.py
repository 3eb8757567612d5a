"""FlexLoRA: the clients' exact sum, of which every client restarts from as many components as its rank allows.

Bai et al., NeurIPS 2024, arXiv 2402.11505. Where the paper forms and decomposes the dense sum, factors are decomposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from fedtune.lora import lowrank
from fedtune.lora.adapter import Adapter, unpack
from fedtune.lora.lowrank import LowRank, weighted_sums
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    PlannedClient,
    TrainLora,
    cohort_weights,
)
from fedtune.methods.adapter_start import leading_components
from fedtune.methods.flora import warm_start
from fedtune.methods.method import Method, make_assignment, mean_saved
from fedtune.methods.serialization import NOT_PERSISTED
from fedtune.methods.settings import AveragingSettings
from fedtune.seeds import derive
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class FlexLoraSettings(AveragingSettings):
    """Settings of `flexlora`."""

    name: Literal["flexlora"] = "flexlora"
    """Name of the method."""


@dataclass(frozen=True)
class FlexLoraState:
    settings: FlexLoraSettings = field(metadata=NOT_PERSISTED)
    round: int
    """Rounds completed."""
    a_key: int
    """Key of the rows of A that the sum does not fill: all of them in round 1."""
    max_rank: int
    """The largest planned rank: components beyond it reach no client."""
    total: Tensors
    """D = sum of p_k b_k a_k as `lowrank.pack` makes it flat, float32, scale folded in."""
    saved: Tensors


def init(blueprint: Blueprint, settings: FlexLoraSettings) -> FlexLoraState:
    """Return the first state: a sum of zero."""
    return FlexLoraState(
        settings=settings,
        round=0,
        a_key=derive(blueprint.seed, "lora.shared_a"),
        max_rank=blueprint.max_rank,
        total=lowrank.pack({name: lowrank.zero(m, n) for name, (m, n) in blueprint.modules.items()}),
        saved=blueprint.saved,
    )


def start(state: FlexLoraState, adapter: Adapter, saved: Tensors) -> FlexLoraState:
    """Return the first state with an adapter of at most the largest planned rank: more would reach no client."""
    changes = leading_components(adapter, state.max_rank, method="flexlora")
    return replace(state, total={**state.total, **lowrank.pack(changes)}, saved={**state.saved, **saved})


def assign(state: FlexLoraState, seed: int, planned: PlannedClient) -> Assignment:
    """Send the leading plan.rank components of D; the client trains and returns both factors."""
    wire_dtype = state.settings.wire_dtype
    start = warm_start(lowrank.unpack(state.total), planned.plan.rank, wire_dtype)
    task = TrainLora(a_key=state.a_key, wire_dtype=wire_dtype)
    return make_assignment("flexlora", state, seed, planned.plan, task, {"local": start})


def aggregate(state: FlexLoraState, updates: Sequence[AdmittedUpdate]) -> FlexLoraState:
    """Return the state after one round: D moves to the clients' exact weighted sum."""
    cohort, rate = cohort_weights(updates, state.settings.weights), state.settings.server_learning_rate
    adapters = [(unpack(update.lora.tensors), rate * share) for update, share in cohort]
    total = weighted_sums(
        {
            # In factors: the dense sum of a 4096 x 4096 layer would take 128 MiB in float64.
            name: [(old.factors, 1 - rate), *((adapter[name], weight) for adapter, weight in adapters)]
            for name, old in lowrank.unpack(state.total).items()
        }
    )
    return replace(
        state,
        round=state.round + 1,
        total=lowrank.pack(total),
        saved=mean_saved(state.saved, cohort, rate),
    )


def largest_share(state: FlexLoraState) -> Mapping[str, LowRank]:
    """Return the components that a client of the largest rank gets, before the cast to the wire format."""
    return {name: low.components(0, state.max_rank) for name, low in lowrank.unpack(state.total).items()}


def adapter(state: FlexLoraState) -> Adapter:
    """Return what the client of the largest rank is sent, in float32; the rest of D is lost in the next round."""
    return lowrank.adapter(largest_share(state))


def energy_kept(state: FlexLoraState) -> Mapping[str, float]:
    whole = lowrank.unpack(state.total)
    return {name: lowrank.energy_kept(whole[name], part) for name, part in largest_share(state).items()}


METHOD = Method(
    name="flexlora",
    settings=FlexLoraSettings,
    init=init,
    start=start,
    assign=assign,
    aggregate=aggregate,
    adapter=adapter,
    energy_kept=energy_kept,
    wire_dtype=lambda settings: settings.wire_dtype,
    why_not_linear="it adds up products b a of any rank; ffa and zeropad average clients of any ranks",
    why_not_pruned="it restarts clients from whole factors",
)
