"""A method, a planner and a data source for fedtune, as a package of its own would bring them."""

# --8<-- [start:imports]
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge

from fedtune.lora.adapter import Adapter, unpack
from fedtune.messages import AdmittedUpdate, Assignment, Blueprint, Client, PlannedClient, TrainLora
from fedtune.methods.fedit import shared_start
from fedtune.methods.method import Method, make_assignment
from fedtune.methods.serialization import NOT_PERSISTED
from fedtune.planning.planner import ClientObservation, PlannerInputs, PlannerType
from fedtune.tensors import Tensors

# --8<-- [end:imports]
# --8<-- [start:method]
# A method: the coordinate-wise median of the clients' factors (Yin et al., ICML 2018, arXiv 1803.01498)


@dataclass(frozen=True)
class MedianSettings:
    """Settings of `median`; the recipe's table `method` is bound to them."""

    name: Literal["median"] = "median"


@dataclass(frozen=True)
class MedianState:
    settings: MedianSettings = field(metadata=NOT_PERSISTED)
    round: int
    """Rounds completed."""
    tensors: Tensors
    """Flat factors, float32."""
    saved: Tensors
    """modules_to_save."""


def init(blueprint: Blueprint, settings: MedianSettings) -> MedianState:
    return MedianState(settings, round=0, tensors=shared_start(blueprint), saved=blueprint.saved)


def assign(state: MedianState, seed: int, planned: PlannedClient) -> Assignment:
    task = TrainLora(a_key=0, wire_dtype="fp32")
    return make_assignment("median", state, seed, planned.plan, task, {"local": state.tensors})


def aggregate(state: MedianState, updates: Sequence[AdmittedUpdate]) -> MedianState:
    return replace(
        state,
        round=state.round + 1,
        tensors=median([update.lora.tensors for update in updates]),
        saved=median([update.lora.saved for update in updates]),
    )


def median(parts: Sequence[Tensors]) -> Tensors:
    return {name: np.median([part[name] for part in parts], axis=0).astype(np.float32) for name in parts[0]}


def adapter(state: MedianState) -> Adapter:
    return unpack(state.tensors)


METHOD = Method(
    name="median",
    settings=MedianSettings,
    init=init,
    assign=assign,
    aggregate=aggregate,
    adapter=adapter,
    ranks="equal",
    why_not_pruned="a median of factors that lack different rows is not the median of the changes",
)

# --8<-- [end:method]
# --8<-- [start:planner]
# A planner: fewer steps for clients with few examples


@dataclass(frozen=True)
class ByExamplesSettings:
    """Settings of `by-examples`; the recipe's table `planner` is bound to them."""

    name: Literal["by-examples"] = "by-examples"
    few: Annotated[int, Ge(1)] = 6
    """Clients with fewer training examples than this take one step a round."""


@dataclass(frozen=True)
class ByExamples:
    few: int
    inputs: PlannerInputs

    def start(self) -> None:
        """Return None: nothing is learned."""

    def plan(self, learned: Any, round: int, cohort: Sequence[Client]) -> Mapping[str, PlannedClient]:
        return {
            client.name: self.inputs.plan(client, steps=1 if client.num_examples < self.few else None)
            for client in cohort
        }

    def observe(self, learned: Any, seen: Sequence[ClientObservation]) -> None:
        """Learn nothing."""


PLANNER = PlannerType(
    name="by-examples",
    settings=ByExamplesSettings,
    create=lambda settings, inputs: ByExamples(settings.few, inputs),
)

# --8<-- [end:planner]
# --8<-- [start:data]
# A data source: rows by client; one of them says itself which rows it holds out


def proverbs() -> Mapping[str, Any]:
    rows = [{"text": f"{who} {verb} best"} for who in ("he", "she", "who") for verb in ("laughs", "knows", "sees")]
    return {"north": rows[:5], "south": {"train": rows[:8], "held_out": rows[8:]}}


# --8<-- [end:data]
