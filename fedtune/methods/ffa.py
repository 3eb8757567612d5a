"""FFA-LoRA: A is drawn once and frozen, only B is trained, so the mean is exact (Sun et al., ICLR 2024, 2403.12313)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np

from fedtune.lora.adapter import Adapter, Factors, draw_a
from fedtune.messages import AdmittedUpdate, Assignment, Blueprint, PlannedClient, TrainLora
from fedtune.methods.adapter_start import project
from fedtune.methods.change import Change, change_of
from fedtune.methods.method import LinearMethod, end_of, join, leading_ranks, make_assignment, move, resize
from fedtune.methods.serialization import NOT_PERSISTED
from fedtune.methods.settings import LinearSettings, down_dtype
from fedtune.seeds import derive
from fedtune.tensors import Array, Tensors


@dataclass(frozen=True)
class FfaSettings(LinearSettings):
    """Settings of `ffa`."""

    name: Literal["ffa"] = "ffa"
    """Name of the method."""


@dataclass(frozen=True)
class FfaState:
    settings: FfaSettings = field(metadata=NOT_PERSISTED)
    round: int
    """Rounds completed."""
    a_key: int
    """Key from which the server and every client draw the same A; a client of smaller rank holds its first rows."""
    in_features: Mapping[str, int]
    """Width of every module's A."""
    max_rank: int
    """The largest planned rank, fixed for the run."""
    tensors: Tensors
    """`<module>.b` (out, max_rank), float32, scale folded in."""
    saved: Tensors

    @cached_property
    def drawn(self) -> Mapping[str, Array]:
        """A of every module: drawn once for a round, where each of its updates would take as long to admit again."""
        return {name: draw_a(self.a_key, name, self.max_rank, n) for name, n in self.in_features.items()}

    @cached_property
    def leading(self) -> Callable[[int], Tensors]:
        """Gives the start of every client of a rank, as it travels; see `leading_ranks`."""
        return leading_ranks(self.tensors, down_dtype(self.settings))


def init(blueprint: Blueprint, settings: FfaSettings) -> FfaState:
    """Return the first state: B zero, A known by its key."""
    return FfaState(
        settings=settings,
        round=0,
        # One A for the whole run: sum of p_k B_k A = (sum of p_k B_k) A holds only as long as it is shared.
        a_key=derive(blueprint.seed, "lora.shared_a"),
        in_features={name: n for name, (_, n) in blueprint.modules.items()},
        max_rank=blueprint.max_rank,
        tensors={
            f"{name}.b": np.zeros((m, blueprint.max_rank), np.float32) for name, (m, _) in blueprint.modules.items()
        },
        saved=blueprint.saved,
    )


def start(state: FfaState, adapter: Adapter, saved: Tensors) -> FfaState:
    """Return the first state with an adapter whose change lies in the rows of the frozen A, as after a run of `ffa`."""
    tensors = {**state.tensors, **project(adapter, state.drawn)}
    return replace(state, tensors=tensors, saved={**state.saved, **saved})


def assign(state: FfaState, seed: int, planned: PlannedClient) -> Assignment:
    """Send the first plan.rank columns of B; the client trains B alone and returns what has changed."""
    task = TrainLora(a_key=state.a_key, train="b", upload="difference", wire_dtype=state.settings.wire_dtype)
    return make_assignment("ffa", state, seed, planned.plan, task, {"local": state.leading(planned.plan.rank)})


def contribution(state: FfaState, update: AdmittedUpdate) -> Tensors:
    """Return the client's B with zero columns up to max_rank: the same product with the whole shared A."""
    return join(resize(end_of(state.tensors, update), state.max_rank), update.lora.saved)


def current(state: FfaState) -> Tensors:
    return join(state.tensors, state.saved)


def advance(state: FfaState, mean: Tensors) -> FfaState:
    """Return the state after one round: B moves to its weighted mean."""
    tensors, saved = move(state.tensors, state.saved, mean, state.settings.server_learning_rate)
    return replace(state, round=state.round + 1, tensors=tensors, saved=saved)


def change(state: FfaState, blueprint: Blueprint, assignment: Assignment, update: AdmittedUpdate) -> Iterator[Change]:
    """Yield what an update changes, with the one A that all clients have."""
    return change_of(state.saved, blueprint, assignment, update, state.drawn)


def adapter(state: FfaState) -> Adapter:
    return {name: Factors(a=a, b=state.tensors[f"{name}.b"]) for name, a in state.drawn.items()}


METHOD = LinearMethod(
    name="ffa",
    settings=FfaSettings,
    init=init,
    start=start,
    assign=assign,
    adapter=adapter,
    change=change,
    contribution=contribution,
    current=current,
    weights=lambda state: state.settings.weights,
    advance=advance,
    averages_factors=True,
    wire_dtype=lambda settings: settings.wire_dtype,
    down_dtype=down_dtype,
    why_not_pruned="its shared A would be cut differently at every client",
)
