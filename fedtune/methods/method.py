"""The interface of a method, pure functions over a frozen state, and the few steps that several methods share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

import numpy as np

from fedtune.directions.seed_ledger import Manifest, SeedLedger
from fedtune.errors import Fault
from fedtune.lora.adapter import Adapter, stack
from fedtune.lora.dense import Summed
from fedtune.messages import (
    AdmittedUpdate,
    Assignment,
    Blueprint,
    Plan,
    PlannedClient,
    Proximal,
    Task,
    Term,
    Training,
    TrainLora,
    Weighting,
    WireDtype,
    cohort_weights,
)
from fedtune.methods.change import Change, change_of
from fedtune.number_formats import to_wire
from fedtune.pruning.structure import ModelStructure
from fedtune.seeds import derive
from fedtune.tensors import Array, Tensors, weighted_mean

State = TypeVar("State", bound="MethodState")
Cohort: TypeAlias = Sequence[tuple[AdmittedUpdate, float]]
"""Updates with their weights p_k, sorted by client name, as `cohort_weights` returns them."""


class MethodState(Protocol):
    """What the round loop reads of any method's state; all arrays of a state are in flat `Tensors`."""

    @property
    def round(self) -> int: ...
    @property
    def saved(self) -> Tensors: ...


@dataclass(frozen=True)
class SeedModel:
    """A global model's change as K integers, and the tensors that it reaches."""

    ledger: SeedLedger
    manifest: Manifest
    trainable: Sequence[int]
    """Ordinals of the tensors that are moved."""
    head: Tensors = field(default_factory=dict)
    """In the place of the base's own, by parameter name, where the run has made one."""


@dataclass(frozen=True)
class GlobalModel:
    """A global model, as its change of the base."""

    adapter: Adapter = field(default_factory=dict)
    """Of scale 1."""
    saved: Tensors = field(default_factory=dict)
    """modules_to_save, by parameter name, float32."""
    seeds: SeedModel | None = None
    moments: Tensors = field(default_factory=dict)
    """Of the base's layers, by which pruned models are repaired; empty where they are not."""
    second: Adapter = field(default_factory=dict)
    """Of scale 1, in the base's coordinates: added in the structure that is deployed, and in no other model."""
    second_structure: bytes = b""
    """Digest of that structure."""

    def at(self, structure: ModelStructure | None) -> Adapter:
        """Return the change of the base in a structure, in the base's coordinates."""
        if structure is None or not self.second or structure.digest != self.second_structure:
            return self.adapter
        return stack([(self.adapter, 1.0), (self.second, 1.0)])


def no_seeds(state: MethodState) -> SeedModel | None:
    """Return None: the whole change is in the adapter."""
    return None


def accept(state: MethodState, update: AdmittedUpdate) -> str:
    """Return no objection: admission has checked what concerns every method."""
    return ""


def no_other_assignment(state: MethodState, seed: int, planned: PlannedClient) -> Assignment | None:
    """Return nothing: the assignments of this method refer to no earlier state."""
    return None


def no_figures(state: MethodState) -> Mapping[str, Any]:
    return {}


def no_remarks(state: MethodState) -> Sequence[str]:
    return ()


def no_truncation(state: MethodState) -> Mapping[str, float]:
    """Return no shares: what this method sends down is whole."""
    return {}


def whole_model(state: MethodState, ratio: float) -> ModelStructure | None:
    """Return None: every client trains the whole model."""
    return None


def no_ranking(state: MethodState) -> Tensors:
    return {}


def no_moments(state: MethodState) -> Tensors:
    return {}


def no_second(state: MethodState) -> tuple[Adapter, bytes]:
    """Return nothing: one adapter is all that this method trains."""
    return {}, b""


def no_bound(settings: Any, rank: int) -> int | None:
    return None


def full_precision(settings: Any) -> WireDtype:
    return "fp32"


def no_faults(settings: Any, steps: Sequence[int | None]) -> Iterable[Fault]:
    return ()


def no_displacement(state: MethodState, update: AdmittedUpdate) -> Iterable[tuple[str, Array]]:
    """Return nothing: a change of the model is all that this method makes of an update."""
    return ()


def change_from_start(
    state: MethodState, blueprint: Blueprint, assignment: Assignment, update: AdmittedUpdate
) -> Iterator[Change]:
    """Return what an update of the whole model changes, against what its client was sent."""
    return change_of(state.saved, blueprint, assignment, update)


@dataclass(frozen=True)
class Method(Generic[State]):
    """A method of federated tuning: pure functions over a frozen state.

    The operations with a default are optional. They let other packages ask a method instead of knowing its name.
    """

    name: str
    settings: type[Any]
    """The frozen dataclass of the method's settings; the recipe's table `method` is bound to it."""
    init: Callable[[Blueprint, Any], State]
    """(blueprint, settings) -> the state before round 1"""
    assign: Callable[[State, int, PlannedClient], Assignment]
    """(state, run seed, a client with its plan) -> what that client is asked to do"""
    aggregate: Callable[[State, Sequence[AdmittedUpdate]], State]
    """(state, admitted updates, at least one) -> the next state"""
    adapter: Callable[[State], Adapter]
    """state -> the global model's change of the base, as one adapter of scale 1"""
    change: Callable[[State, Blueprint, Assignment, AdmittedUpdate], Iterable[Change]] = change_from_start
    """(state, blueprint, an assignment, the update that answers it) -> what that update changes, in parts. Admission
    bounds it, and no update reaches `aggregate` whose change it has not bounded."""
    displacement: Callable[[State, AdmittedUpdate], Iterable[tuple[str, Array]]] = no_displacement
    """(state, update) -> what enters a mean, or a robust rule in its place, minus the server's own values, by name and
    one tensor at a time; admission bounds it as well"""
    ranks: Literal["any", "equal"] = "any"
    """`any`: clients may differ in rank; `equal`: one rank for all."""
    modules: Literal["any", "equal"] = "equal"
    """`any`: clients may train some of the modules alone, or each of a rank of its own; `equal`: all modules alike,
    because a mean of factors is one over the same modules."""
    energy_kept: Callable[[State], Mapping[str, float]] = no_truncation
    """state -> by module, the share of the squared singular values that is left in what is sent down"""
    state_energy_kept: Callable[[State], Mapping[str, float]] = no_truncation
    """state -> by module, the share of the squared singular values that the server has kept of all it has summed"""
    decomposed: Callable[[State], Mapping[str, Summed]] | None = None
    """state -> the global model's change of the base by module, where the state holds its singular values; None: it
    does not, and they are computed"""
    task: type[Task] = TrainLora
    """What clients do; for `ProbeSeeds` they need no adapter, and the server must know every tensor of the base."""
    assign_whole: Callable[[State, int, PlannedClient], Assignment | None] = no_other_assignment
    """(as `assign`) -> what is sent in its place to a client that lacks the state which that message refers to"""
    seeds: Callable[[State], SeedModel | None] = no_seeds
    """state -> the global model's change of the whole base, beside its adapter"""
    refuse: Callable[[State, AdmittedUpdate], str] = accept
    """(state, an update that fits its assignment) -> why it cannot be used all the same; empty if it can"""
    figures: Callable[[State], Mapping[str, Any]] = no_figures
    """state -> numbers for the round's line in rounds.jsonl"""
    remarks: Callable[[State], Sequence[str]] = no_remarks
    """state -> what users should hear of its last round, such as whose change was cut, a line each"""
    structure: Callable[[State, float], ModelStructure | None] = whole_model
    """(state, pruning ratio) -> what is left of the model at that ratio; None: all of it"""
    ranking: Callable[[State], Tensors] = no_ranking
    """state -> scores of `heads` and `channels`, by which they are pruned; empty before there are any"""
    moments: Callable[[State], Tensors] = no_moments
    """state -> moments of the base's layers by which pruned models are repaired (`pruning.least_squares`); empty where
    there are none"""
    second: Callable[[State], tuple[Adapter, bytes]] = no_second
    """state -> the repair adapter of the deployed structure, and that structure's digest; empty where there is none"""
    why_not_pruned: str = "it does not scatter what pruned clients send"
    """Why the method refuses the recipe's table `pruning`; empty if clients may be pruned."""
    why_not_linear: str = ""
    """Why the method takes no server optimiser and no robust rule, and which one does; empty where it is linear."""
    downlink_rank: Callable[[Any, int], int | None] = no_bound
    """(settings, a client's rank) -> the largest rank of what it is sent; None: no bound"""
    wire_dtype: Callable[[Any], WireDtype] = full_precision
    """settings -> number format of what clients send"""
    down_dtype: Callable[[Any], WireDtype] | None = None
    """settings -> number format of what is sent down; None: as clients send"""
    why_not_asynchronous: str = "it does not say what an update adds whose client started from an earlier state"
    """Why the method refuses the recipe's table `asynchronous`; empty if `aggregate` reads `origin` and `discount` of
    the updates."""
    freezes: bool = False
    """Whether clients hold a frozen change of the base beside what they train."""
    start: Callable[[State, Adapter, Tensors], State] | None = None
    """(the state before round 1, an adapter of scale 1, its modules_to_save) -> the state whose global model is that
    adapter; None: the method cannot start from one"""
    faults: Callable[[Any, Sequence[int | None]], Iterable[Fault]] = no_faults
    """(settings, steps of a round by kind of client, None where epochs decide) -> what does not fit together"""

    @property
    def operations(self) -> Mapping[str, Callable[..., Any]]:
        """The functions of a state that hand nothing on to the next one."""
        return {
            "assign": self.assign,
            "assign_whole": self.assign_whole,
            "change": self.change,
            "displacement": self.displacement,
            "adapter": self.adapter,
            "energy_kept": self.energy_kept,
            "state_energy_kept": self.state_energy_kept,
            "seeds": self.seeds,
            "refuse": self.refuse,
            "figures": self.figures,
            "remarks": self.remarks,
            "structure": self.structure,
            "ranking": self.ranking,
            "moments": self.moments,
            "second": self.second,
        }

    def global_model(self, state: State) -> GlobalModel:
        """Return the global model of a state."""
        return GlobalModel(
            self.adapter(state), state.saved, self.seeds(state), self.moments(state), *self.second(state)
        )


@dataclass(frozen=True, kw_only=True)
class LinearMethod(Method[State]):
    """A method whose aggregation is `advance(state, weighted mean)`: the mean of the contributions is all it sees.

    Only this kind can take a server optimiser, or be made private or secure.
    """

    aggregate: Callable[[State, Sequence[AdmittedUpdate]], State] = field(init=False, repr=False, compare=False)
    contribution: Callable[[State, AdmittedUpdate], Tensors]
    """(state, update) -> the tensors of the client that are averaged"""
    current: Callable[[State], Tensors]
    """state -> the server's own values of these tensors, float32"""
    weights: Callable[[State], Weighting]
    """state -> how clients are weighed in the mean"""
    advance: Callable[[State, Tensors], State]
    """(state, mean) -> the next state"""
    why_not_asynchronous: str = ""
    averages_factors: bool = False
    """Whether `contribution` is the factors of a client, with zeros for the ranks that it lacks, and its
    modules_to_save: then no norm but theirs is needed to bound what enters the mean."""

    def __post_init__(self) -> None:
        # Derived, never passed: `replace(method, advance=...)` then changes the aggregation as well.
        object.__setattr__(self, "aggregate", partial(advance_to_mean, self))
        object.__setattr__(self, "displacement", partial(off_the_servers_values, self))

    @property
    def operations(self) -> Mapping[str, Callable[..., Any]]:
        """The functions of a state that hand nothing on to the next one."""
        return {
            **super().operations,
            "contribution": self.contribution,
            "current": self.current,
            "weights": self.weights,
        }


def off_the_servers_values(
    method: LinearMethod[State], state: State, update: AdmittedUpdate
) -> Iterator[tuple[str, Array]]:
    """Yield a contribution minus the server's own values, one tensor after the other."""
    current, contribution = method.current(state), method.contribution(state, update)
    return ((name, contribution[name] - current[name]) for name in current)


def advance_to_mean(method: LinearMethod[State], state: State, updates: Sequence[AdmittedUpdate]) -> State:
    """Return the state after one round of a linear method: the contributions are averaged with p_k."""
    cohort = cohort_weights(updates, method.weights(state))
    mean = weighted_mean([(contribution_now(method, state, update, update.origin), share) for update, share in cohort])
    return method.advance(state, mean)


def contribution_now(
    method: LinearMethod[State], state: State, update: AdmittedUpdate, origin: State | None
) -> Tensors:
    """Return the contribution of an update as if its client had started from the current state.

    What it has changed since `origin`, times its discount, on top of the server's own values now. The shares of a mean
    are not divided by the sum of the discounts: a stale buffer takes a shorter step.

    Args:
        method: whose contributions are averaged.
        state: the current one.
        update: of a client.
        origin: the state that the client started from; None: the current one.
    """
    if origin is None and update.discount == 1.0:
        # As it is, to the last bit: x + (y - x) is not y.
        return method.contribution(state, update)
    start = state if origin is None else origin
    return moved_by(method.current(state), method.current(start), method.contribution(start, update), update.discount)


def moved_by(values: Tensors, start: Tensors, end: Tensors, discount: float) -> Tensors:
    """Return values + discount * (end - start), in float64.

    >>> one = np.ones(1, np.float32)
    >>> moved_by({"x": 10 * one}, {"x": one}, {"x": 3 * one}, 0.5)["x"].tolist()
    [11.0]
    """
    return {
        name: value.astype(np.float64) + discount * (end[name].astype(np.float64) - start[name].astype(np.float64))
        for name, value in values.items()
    }


def make_assignment(
    method: str, state: MethodState, seed: int, plan: Plan, task: TrainLora, blobs: Mapping[str, Tensors]
) -> Assignment:
    """Return what one client is asked to do in the coming round.

    modules_to_save join the blobs, empty blobs are left out, and `client.proximal` and `client.objective` become terms
    of the objective.
    """
    blobs = {role: tensors for role, tensors in {**blobs, "saved": state.saved}.items() if tensors}
    return Assignment(
        method=method,
        round=state.round + 1,
        # By round and name: whichever engine or machine trains this client, it draws the same.
        seed=derive(seed, "client", state.round + 1, plan.client),
        plan=plan,
        task=replace(task, terms=(*task.terms, *recipe_terms(plan.training)), blobs=blobs),
    )


def recipe_terms(training: Training) -> Iterator[Term]:
    """Yield the terms of the objective that a recipe asks for, whatever its method."""
    # Only where they are used: a term of 0 would change the bytes of every message.
    if training.proximal > 0:
        yield Proximal(training.proximal)
    if training.preference is not None:
        yield training.preference


def join(tensors: Tensors, saved: Tensors) -> Tensors:
    """Return factors and modules_to_save as one mapping, for a mean over both."""
    # Prefixes, since a factor and a parameter trained in full may have one name.
    return {f"local/{name}": t for name, t in tensors.items()} | {f"saved/{name}": t for name, t in saved.items()}


def move(tensors: Tensors, saved: Tensors, mean: Tensors, server_learning_rate: float) -> tuple[Tensors, Tensors]:
    """Return (factors, modules_to_save) after a step towards the clients' mean, which `join` has laid out."""
    new = step(join(tensors, saved), mean, server_learning_rate)
    return {name: new[f"local/{name}"] for name in tensors}, {name: new[f"saved/{name}"] for name in saved}


def step(old: Tensors, mean: Tensors, server_learning_rate: float) -> Tensors:
    """Return old + server_learning_rate * (mean - old), which is the mean itself at 1."""
    if server_learning_rate == 1.0:
        # Taken as it is: old + (mean - old) is not the mean to the last bit.
        return mean
    rate = np.float32(server_learning_rate)
    return {name: old[name] + rate * (mean[name] - old[name]) for name in old}


def mean_saved(old: Tensors, cohort: Cohort, server_learning_rate: float) -> Tensors:
    """Return modules_to_save after the round: every method averages them with p_k."""
    return step(old, weighted_mean([(saved_now(old, update), share) for update, share in cohort]), server_learning_rate)


def saved_now(old: Tensors, update: AdmittedUpdate) -> Tensors:
    """Return a client's modules_to_save, as if it had started from the current ones."""
    if update.origin is None and update.discount == 1.0:
        return update.lora.saved
    return moved_by(old, old if update.origin is None else update.origin.saved, update.lora.saved, update.discount)


def end_of(start: Tensors, update: AdmittedUpdate) -> Tensors:
    """Return a client's factors after training: what it has sent, or the server's own values plus what has changed.

    The server's own, and not what they were rounded to on their way down: a sum over rounds would keep each rounding.

    Args:
        start: flat factors of the client's rank or more, float32.
        update: of the ranks that it trained and has not cut.
    """
    sent = update.lora.tensors
    if update.upload == "factors":
        return sent
    with np.errstate(over="ignore"):
        return {
            name: resize_factor(start[name], name, factor_rank(name, moved)) + moved for name, moved in sent.items()
        }


def factor_rank(name: str, factor: Array) -> int:
    """Return the rank of a factor: rows of a, columns of b."""
    return int(factor.shape[0 if name.endswith(".a") else 1])


def resize(tensors: Tensors, rank: int) -> Tensors:
    """Return flat factors cut, or padded with zeros, to a rank: rows of every `.a`, columns of every `.b`."""
    # Zero rows of a and columns of b add nothing to b a: a padded adapter is the same change of the base.
    return {name: resize_factor(factor, name, rank) for name, factor in tensors.items()}


def leading_ranks(tensors: Tensors, dtype: WireDtype) -> Callable[[int], Tensors]:
    """Return rank -> flat factors of that rank in a wire format: one mapping for all that ask, so it is encoded once.

    To be kept with the state that the factors are of: what it has computed follows from them alone.
    """
    return cache(lambda rank: to_wire(resize(tensors, rank), dtype))


def resize_factor(factor: Array, name: str, rank: int) -> Array:
    m, n = factor.shape
    if rank == factor_rank(name, factor):
        return factor
    if name.endswith(".a"):
        return np.concatenate([factor[:rank], np.zeros((max(0, rank - m), n), factor.dtype)], axis=0)
    return np.concatenate([factor[:, :rank], np.zeros((m, max(0, rank - n)), factor.dtype)], axis=1)
