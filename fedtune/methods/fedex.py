"""FedEx-LoRA: FedIT, and what its mean of factors misses as a frozen residual (Singhal et al., ACL 2025, 2410.09432).

The paper adds the residual to the base; here it stays beside it, factored and in float32, which is exact for any base.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from fedtune.lora import lowrank
from fedtune.lora.adapter import Adapter, stack, unpack
from fedtune.lora.lowrank import compress, weighted_sums
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    PlannedClient,
    TrainLora,
    cohort_weights,
)
from fedtune.methods.adapter_start import fill, rank_of
from fedtune.methods.fedit import shared_start
from fedtune.methods.flora import warm_start
from fedtune.methods.method import Method, end_of, make_assignment, mean_saved, step
from fedtune.methods.serialization import NOT_PERSISTED
from fedtune.methods.settings import AveragingSettings, down_dtype
from fedtune.number_formats import to_wire
from fedtune.tensors import Tensors, weighted_mean


@dataclass(frozen=True)
class FedExSettings(AveragingSettings):
    """Settings of `fedex`."""

    name: Literal["fedex"] = "fedex"
    """Name of the method."""


@dataclass(frozen=True)
class FedExState:
    settings: FedExSettings = field(metadata=NOT_PERSISTED)
    round: int
    """Rounds completed."""
    tensors: Tensors
    """Flat factors that clients train on, float32; b carries the scale."""
    residual: Tensors
    """The rest of the global model's change, as `lowrank.pack` makes it flat, float32."""
    saved: Tensors

    @cached_property
    def sent(self) -> Mapping[str, Tensors]:
        """Factors and residual in wire format: the same mappings for the whole cohort, so each is encoded once."""
        # Its rank is up to (K + 1) r for K clients, so the dense matrix may be the smaller message.
        frozen = lowrank.smallest(lowrank.adapter(lowrank.unpack(self.residual)))
        return {
            "global": to_wire(frozen, down_dtype(self.settings)),
            "local": to_wire(self.tensors, down_dtype(self.settings)),
        }


def init(blueprint: Blueprint, settings: FedExSettings) -> FedExState:
    """Return the first state: one A drawn for all clients, B zero, no residual."""
    return FedExState(
        settings=settings,
        round=0,
        tensors=shared_start(blueprint),
        residual=lowrank.pack({name: lowrank.zero(m, n) for name, (m, n) in blueprint.modules.items()}),
        saved=blueprint.saved,
    )


def start(state: FedExState, adapter: Adapter, saved: Tensors) -> FedExState:
    """Return the first state with an adapter of any ranks: its largest components are trained, the rest is frozen."""
    changes, rank = compress(adapter), rank_of(state.tensors)
    rest = {name: low.components(rank, low.rank) for name, low in changes.items()}
    return replace(
        state,
        tensors=fill(state.tensors, unpack(warm_start(changes, rank, "fp32")), method="fedex"),
        residual={**state.residual, **lowrank.pack(rest)},
        saved={**state.saved, **saved},
    )


def assign(state: FedExState, seed: int, planned: PlannedClient) -> Assignment:
    """Send both factors to train and the residual frozen; the client returns what has changed."""
    # The key is not used: every row of A is sent.
    task = TrainLora(a_key=0, upload="difference", wire_dtype=state.settings.wire_dtype)
    return make_assignment("fedex", state, seed, planned.plan, task, state.sent)


def aggregate(state: FedExState, updates: Sequence[AdmittedUpdate]) -> FedExState:
    """Return the state after one round: mean factors, and the residual that makes the model's change exact.

    With eta = server_learning_rate: residual + (1 - eta) b a + eta * sum of p_k b_k a_k - b' a', b' and a' the new
    factors; at eta = 1 the paper's equation 5, accumulated.
    """
    cohort, rate = cohort_weights(updates, state.settings.weights), state.settings.server_learning_rate
    ends = [(end_of(state.tensors, update), share) for update, share in cohort]
    mean = weighted_mean(ends)
    tensors = step(state.tensors, mean, rate)
    old, new = unpack(state.tensors), unpack(tensors)
    adapters = [(unpack(end), rate * share) for end, share in ends]
    # Only differences enter the residual: what the mean of factors represents already is subtracted again.
    residual = weighted_sums(
        {
            name: [
                (before.factors, 1.0),
                (old[name], 1 - rate),
                *((adapter[name], weight) for adapter, weight in adapters),
                (new[name], -1.0),
            ]
            for name, before in lowrank.unpack(state.residual).items()
        }
    )
    return replace(
        state,
        round=state.round + 1,
        tensors=tensors,
        residual=lowrank.pack(residual),
        saved=mean_saved(state.saved, cohort, rate),
    )


def adapter(state: FedExState) -> Adapter:
    """Return factors and residual as one adapter."""
    residual = lowrank.adapter(lowrank.unpack(state.residual))
    return stack([(unpack(state.tensors), 1.0), (residual, 1.0)])


METHOD = Method(
    name="fedex",
    settings=FedExSettings,
    init=init,
    start=start,
    assign=assign,
    aggregate=aggregate,
    adapter=adapter,
    ranks="equal",
    wire_dtype=lambda settings: settings.wire_dtype,
    down_dtype=down_dtype,
    freezes=True,
    why_not_asynchronous="its residual is exact for factors of one start alone; take fedit, or flora",
    why_not_linear="its residual holds every client's product; fedit averages the same factors",
    why_not_pruned="its residual is that of whole factors",
)
