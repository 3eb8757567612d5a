"""Zero-padding: mixed ranks padded with zeros to the largest, then averaged as in FedIT (the baseline of HetLoRA)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from fedtune.lora.adapter import Adapter, unpack
from fedtune.messages import AdmittedUpdate, Assignment, Blueprint, PlannedClient, TrainLora
from fedtune.methods.adapter_start import fill_leading
from fedtune.methods.fedit import shared_start
from fedtune.methods.method import LinearMethod, end_of, join, leading_ranks, make_assignment, move, resize
from fedtune.methods.serialization import NOT_PERSISTED
from fedtune.methods.settings import LinearSettings, down_dtype
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class ZeroPadSettings(LinearSettings):
    """Settings of `zeropad`."""

    name: Literal["zeropad"] = "zeropad"
    """Name of the method."""


@dataclass(frozen=True)
class ZeroPadState:
    settings: ZeroPadSettings = field(metadata=NOT_PERSISTED)
    round: int
    """Rounds completed."""
    max_rank: int
    """The largest planned rank: fixed for the run, whichever clients take part."""
    tensors: Tensors
    """Flat factors of rank max_rank, float32; b carries the scale, so a client's own alpha / rank never mixes in."""
    saved: Tensors

    @cached_property
    def leading(self) -> Callable[[int], Tensors]:
        """Gives the start of every client of a rank, as it travels; see `leading_ranks`."""
        return leading_ranks(self.tensors, down_dtype(self.settings))


def init(blueprint: Blueprint, settings: ZeroPadSettings) -> ZeroPadState:
    """Return the first state: one A drawn for all clients, B zero."""
    tensors = shared_start(blueprint)
    return ZeroPadState(settings=settings, round=0, max_rank=blueprint.max_rank, tensors=tensors, saved=blueprint.saved)


def start(state: ZeroPadState, adapter: Adapter, saved: Tensors) -> ZeroPadState:
    """Return the first state with an adapter of at most the largest planned rank, its largest components first."""
    tensors = fill_leading(state.tensors, adapter, method="zeropad")
    return replace(state, tensors=tensors, saved={**state.saved, **saved})


def assign(state: ZeroPadState, seed: int, planned: PlannedClient) -> Assignment:
    """Send the first plan.rank rows of A and columns of B; the client trains both and returns what has changed."""
    # The key is not used: every row of A is sent.
    task = TrainLora(a_key=0, upload="difference", wire_dtype=state.settings.wire_dtype)
    return make_assignment("zeropad", state, seed, planned.plan, task, {"local": state.leading(planned.plan.rank)})


def contribution(state: ZeroPadState, update: AdmittedUpdate) -> Tensors:
    """Return the client's factors padded with zeros: what a rank lacks pulls the mean towards zero."""
    return join(resize(end_of(state.tensors, update), state.max_rank), update.lora.saved)


def current(state: ZeroPadState) -> Tensors:
    return join(state.tensors, state.saved)


def advance(state: ZeroPadState, mean: Tensors) -> ZeroPadState:
    """Return the state after one round: padded factors move to their weighted mean."""
    tensors, saved = move(state.tensors, state.saved, mean, state.settings.server_learning_rate)
    return replace(state, round=state.round + 1, tensors=tensors, saved=saved)


def adapter(state: ZeroPadState) -> Adapter:
    return unpack(state.tensors)


METHOD = LinearMethod(
    name="zeropad",
    settings=ZeroPadSettings,
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
    why_not_pruned="a mean of padded factors is no mean of changes",
)
