"""HetLoRA: padded factors weighted by the size of each change; ranks that prune themselves.

Cho et al., EMNLP 2024, arXiv 2401.06432.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Literal

from annotated_types import Ge, Interval

from fedtune.lora.adapter import Adapter, norm, unpack
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    PlannedClient,
    TailRank,
    TrainLora,
    Weighting,
    cohort_weights,
)
from fedtune.methods.adapter_start import fill_leading
from fedtune.methods.fedit import shared_start
from fedtune.methods.method import Method, end_of, leading_ranks, make_assignment, mean_saved, resize, step
from fedtune.methods.serialization import NOT_PERSISTED
from fedtune.methods.settings import AveragingSettings, down_dtype
from fedtune.tensors import Tensors, weighted_mean


@dataclass(frozen=True)
class HetLoraSettings(AveragingSettings):
    """Settings of `hetlora`."""

    name: Literal["hetlora"] = "hetlora"
    """Name of the method."""
    weights: Weighting = "examples"
    """How clients count in the mean of modules_to_save: in proportion to their training examples, or uniform. Factors
    are weighted by the norm of their change."""
    rank_decay: Annotated[float, Interval(gt=0, le=1)] = 0.99
    """Gamma: a client that cuts its rank keeps this share of it; 1 never cuts."""
    rank_penalty: Annotated[float, Ge(0)] = 0.01
    """Lambda: weight in the loss of the factors that a cut would remove; 0 leaves loss and rank as they are."""


@dataclass(frozen=True)
class HetLoraState:
    settings: HetLoraSettings = field(metadata=NOT_PERSISTED)
    round: int
    """Rounds completed."""
    max_rank: int
    """The largest planned rank, fixed for the run."""
    tensors: Tensors
    """Flat factors of rank max_rank, float32; b carries the scale."""
    saved: Tensors
    ranks: Mapping[str, int] = field(default_factory=dict)
    """By client name, the rank that the client last stated."""

    @cached_property
    def leading(self) -> Callable[[int], Tensors]:
        """Gives the start of every client of a rank, as it travels; see `leading_ranks`."""
        return leading_ranks(self.tensors, down_dtype(self.settings))


def init(blueprint: Blueprint, settings: HetLoraSettings) -> HetLoraState:
    """Return the first state: one A drawn for all clients, B zero."""
    tensors = shared_start(blueprint)
    return HetLoraState(settings=settings, round=0, max_rank=blueprint.max_rank, tensors=tensors, saved=blueprint.saved)


def start(state: HetLoraState, adapter: Adapter, saved: Tensors) -> HetLoraState:
    """Return the first state with an adapter of at most the largest planned rank, its largest components first."""
    tensors = fill_leading(state.tensors, adapter, method="hetlora")
    return replace(state, tensors=tensors, saved={**state.saved, **saved})


def assign(state: HetLoraState, seed: int, planned: PlannedClient) -> Assignment:
    """Send the rows and columns of the client's current rank, with the penalty by which it may shrink further."""
    # The scale stays that of the planned rank: alpha / rank of a pruned rank would make what is left grow.
    plan, settings = planned.plan, state.settings
    plan = replace(plan, rank=min(plan.rank, state.ranks.get(plan.client, plan.rank)))
    task = TrainLora(
        a_key=0,
        upload="difference",
        wire_dtype=settings.wire_dtype,
        terms=(TailRank(settings.rank_penalty, settings.rank_decay),),
    )
    return make_assignment("hetlora", state, seed, plan, task, {"local": state.leading(plan.rank)})


def aggregate(state: HetLoraState, updates: Sequence[AdmittedUpdate]) -> HetLoraState:
    """Return the state after one round: padded factors move to their mean, weighted by `size_weights`."""
    cohort, rate = cohort_weights(updates, state.settings.weights), state.settings.server_learning_rate
    ends = {update.client: end_of(state.tensors, update) for update, _ in cohort}
    weights = size_weights(list(ends.values()))
    parts = [(resize(end, state.max_rank), weight) for end, weight in zip(ends.values(), weights, strict=True)]
    stated = {client: max(f.rank for f in unpack(end).values()) for client, end in ends.items()}
    return replace(
        state,
        round=state.round + 1,
        tensors=step(state.tensors, weighted_mean(parts), rate),
        saved=mean_saved(state.saved, cohort, rate),
        # Clients that are not in this cohort keep theirs: a rank that was cut does not grow again.
        ranks={**state.ranks, **stated},
    )


def size_weights(ends: Sequence[Tensors]) -> Sequence[float]:
    """Return each client's share of the cohort's summed Frobenius norms of b @ a over all modules; all zero: equal.

    The paper writes the weight for one matrix; here one weight per client covers all modules.
    """
    # Of the products, since a factor's own norm depends on how the change is split between the two.
    norms = [norm(unpack(end)) for end in ends]
    total = sum(norms)
    return [size / total for size in norms] if total else [1 / len(norms)] * len(norms)


def adapter(state: HetLoraState) -> Adapter:
    return unpack(state.tensors)


METHOD = Method(
    name="hetlora",
    settings=HetLoraSettings,
    init=init,
    start=start,
    assign=assign,
    aggregate=aggregate,
    adapter=adapter,
    wire_dtype=lambda settings: settings.wire_dtype,
    down_dtype=down_dtype,
    why_not_asynchronous="it weighs clients by the sizes of changes from one state; take zeropad",
    why_not_linear="it weighs clients by the size of their changes; zeropad averages the same factors",
    why_not_pruned="its weights compare norms of whole changes",
)
