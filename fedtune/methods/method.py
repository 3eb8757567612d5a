"""What a method is: three pure functions over a frozen state, and one that reads the result out of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from fedtune.adapter import Adapter
from fedtune.round import Assignment, Blueprint, ClientUpdate, Plan, Weighting, weigh
from fedtune.tensors import Tensors, weighted_mean

State = TypeVar("State", bound="MethodState")


class MethodState(Protocol):
    """What the round loop reads of any method's state."""

    @property
    def round(self) -> int: ...
    @property
    def saved(self) -> Tensors: ...


@dataclass(frozen=True)
class Method(Generic[State]):
    """A method of federated tuning; see each file of this folder."""

    name: str
    settings: type[Any]
    """The frozen dataclass of the method's settings; the recipe's table `method` is bound to it."""
    init: Callable[[Blueprint, Any], State]
    """(blueprint, settings) -> the state before round 1"""
    assign: Callable[[State, int, Plan], Assignment]
    """(state, run seed, one client's plan) -> what that client is told"""
    aggregate: Callable[[State, Sequence[ClientUpdate]], State]
    """(state, admitted updates, at least one) -> the next state"""
    adapter: Callable[[State], Adapter]
    """state -> the global model's change of the base, as one adapter of scale 1"""
    ranks: str = "any"
    """`any`: clients may differ in rank; `equal`: one rank for all."""


@dataclass(frozen=True)
class LinearMethod(Method[State]):
    """A method whose aggregation is `advance(state, weighted mean)`: only this kind can be made private or secure."""


def linear(
    *,
    name: str,
    settings: type[Any],
    init: Callable[[Blueprint, Any], State],
    assign: Callable[[State, int, Plan], Assignment],
    contribution: Callable[[State, ClientUpdate], Tensors],
    advance: Callable[[State, Tensors], State],
    weights: Callable[[State], Weighting],
    adapter: Callable[[State], Adapter],
    ranks: str = "any",
) -> LinearMethod[State]:
    """Build a `LinearMethod`: the mean of the contributions, weighted by p_k, is all that `advance` sees."""

    def aggregate(state: State, updates: Sequence[ClientUpdate]) -> State:
        cohort = weigh(updates, weights(state))
        return advance(state, weighted_mean([(contribution(state, update), share) for update, share in cohort]))

    return LinearMethod(
        name=name, settings=settings, init=init, assign=assign, aggregate=aggregate, adapter=adapter, ranks=ranks
    )
