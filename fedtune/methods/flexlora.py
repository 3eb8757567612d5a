"""FlexLoRA: the clients' exact sum, of which every client restarts from as many components as its rank allows.

Bai et al., NeurIPS 2024, arXiv 2402.11505. Where the paper forms and decomposes the dense sum, factors are decomposed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from fedtune.lora import lowrank
from fedtune.lora.adapter import Adapter, Factors, draw_a, pack, unpack
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
from fedtune.methods.method import Method, end_of, make_assignment, mean_saved
from fedtune.methods.serialization import NOT_PERSISTED
from fedtune.methods.settings import AveragingSettings, down_dtype
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

    @cached_property
    def initial(self) -> Tensors:
        """Flat factors that a client of the largest rank starts from, before the cast to the wire format; b of scale 1.

        A client of a smaller rank starts from the first rows of a and columns of b.
        """
        sums, shared = lowrank.unpack(self.total), {}
        sent = warm_start(sums, self.max_rank, "fp32")
        for name, (m, n) in ((name, low.shape) for name, low in sums.items()):
            a, b = draw_a(self.a_key, name, self.max_rank, n), np.zeros((m, self.max_rank), np.float32)
            if f"{name}.a" in sent:
                rank = len(sent[f"{name}.a"])
                a[:rank], b[:, :rank] = sent[f"{name}.a"], sent[f"{name}.b"]
            shared[name] = Factors(a=a, b=b)
        return pack(shared)

    def leading(self, rank: int) -> Tensors:
        """Return the start of a client of this rank in wire format: one mapping for all, so it is encoded once."""
        if rank not in self._leading:
            self._leading[rank] = warm_start(lowrank.unpack(self.total), rank, down_dtype(self.settings))
        return self._leading[rank]

    # A cache; its content follows from the state alone.
    @cached_property
    def _leading(self) -> dict[int, Tensors]:
        return {}


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
    """Send the leading plan.rank components of D; the client trains both factors and returns what has changed."""
    task = TrainLora(a_key=state.a_key, upload="difference", wire_dtype=state.settings.wire_dtype)
    return make_assignment("flexlora", state, seed, planned.plan, task, {"local": state.leading(planned.plan.rank)})


def aggregate(state: FlexLoraState, updates: Sequence[AdmittedUpdate]) -> FlexLoraState:
    """Return the state after one round: D moves to the clients' exact weighted sum."""
    cohort, rate = cohort_weights(updates, state.settings.weights), state.settings.server_learning_rate
    adapters = [(unpack(end_of(state.initial, update)), rate * share) for update, share in cohort]
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
    down_dtype=down_dtype,
    why_not_asynchronous="it replaces the global change by a sum of whole products; take flora, which adds up changes",
    why_not_linear="it adds up products b a of any rank; ffa and zeropad average clients of any ranks",
    why_not_pruned="it restarts clients from whole factors",
)
