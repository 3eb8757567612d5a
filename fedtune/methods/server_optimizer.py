"""FedAvgM, FedAdam and FedYogi over any linear method: the clients' mean minus the current values is the gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from fedtune.lora.adapter import Adapter
from fedtune.messages import Blueprint
from fedtune.methods.method import LinearMethod
from fedtune.methods.serialization import NOT_PERSISTED
from fedtune.methods.settings import LinearSettings, ServerOptimizer
from fedtune.tensors import Array, Tensors

Rule: TypeAlias = Callable[[ServerOptimizer, Array, Array, Array], tuple[Array, Array, Array]]
"""(settings, momentum, variance, change) -> (momentum, variance, step before the learning rate), all float64."""


@dataclass(frozen=True)
class OptimizedState:
    """A linear method's state beside the optimiser's memory, in the coordinates of the clients' mean."""

    settings: LinearSettings = field(metadata=NOT_PERSISTED)
    inner: Any
    """The method's own state."""
    momentum: Tensors
    """m, float32: zero before the first round."""
    variance: Tensors
    """v, float32: tau^2 before the first round, the least that the paper allows; empty under fedavgm."""

    @property
    def round(self) -> int:
        """Rounds completed."""
        return int(self.inner.round)

    @property
    def saved(self) -> Tensors:
        """modules_to_save, which the optimiser moves like the factors."""
        saved: Tensors = self.inner.saved
        return saved


def fedavgm(settings: ServerOptimizer, m: Array, v: Array, change: Array) -> tuple[Array, Array, Array]:
    # Not damped by 1 - momentum: at 0.9 a change that repeats itself adds up to ten times its size.
    m = settings.momentum * m + change
    return m, v, m


def fedadam(settings: ServerOptimizer, m: Array, v: Array, change: Array) -> tuple[Array, Array, Array]:
    # Algorithm 2 of the paper, which has no correction of the bias of the first rounds.
    m = settings.beta1 * m + (1 - settings.beta1) * change
    v = settings.beta2 * v + (1 - settings.beta2) * change**2
    return m, v, m / (np.sqrt(v) + settings.tau)


def fedyogi(settings: ServerOptimizer, m: Array, v: Array, change: Array) -> tuple[Array, Array, Array]:
    m = settings.beta1 * m + (1 - settings.beta1) * change
    # The sign in place of FedAdam's decay: v changes by at most the new square, so it forgets slowly.
    v = v - (1 - settings.beta2) * change**2 * np.sign(v - change**2)
    return m, v, m / (np.sqrt(v) + settings.tau)


RULES: Mapping[str, Rule] = {"fedavgm": fedavgm, "fedadam": fedadam, "fedyogi": fedyogi}


def with_server_optimizer(method: LinearMethod[Any], optimizer: ServerOptimizer) -> LinearMethod[OptimizedState]:
    """Return the method with the server's step taken by an optimiser; all else stays as the method has it."""
    rule = RULES[optimizer.name]

    def init(blueprint: Blueprint, settings: LinearSettings) -> OptimizedState:
        # With a rate of 1 the method takes the values that it is handed: the step is taken here, and only once.
        inner = method.init(blueprint, replace(settings, server_learning_rate=1.0))
        current = method.current(inner)
        zero = {name: np.zeros_like(value) for name, value in current.items()}
        least = {name: np.full_like(value, optimizer.tau**2) for name, value in current.items()}
        return OptimizedState(settings, inner, zero, variance={} if optimizer.name == "fedavgm" else least)

    def start(state: OptimizedState, adapter: Adapter, saved: Tensors) -> OptimizedState:
        assert method.start is not None
        return replace(state, inner=method.start(state.inner, adapter, saved))

    def advance(state: OptimizedState, mean: Tensors) -> OptimizedState:
        values, momentum, variance = {}, {}, {}
        for name, current in method.current(state.inner).items():
            # In float64, rounded once at the end: momentum 0 and a rate of 1 then give the mean itself.
            x, m = current.astype(np.float64), state.momentum[name].astype(np.float64)
            v = state.variance[name].astype(np.float64) if state.variance else np.zeros(())
            m, v, step = rule(optimizer, m, v, mean[name] - x)
            values[name] = (x + state.settings.server_learning_rate * step).astype(np.float32)
            momentum[name] = m.astype(np.float32)
            if state.variance:
                variance[name] = v.astype(np.float32)
        return replace(state, inner=method.advance(state.inner, values), momentum=momentum, variance=variance)

    def on_inner(operation: Callable[..., Any]) -> Callable[..., Any]:
        return lambda state, *rest: operation(state.inner, *rest)

    operations: Mapping[str, Any] = {name: on_inner(operation) for name, operation in method.operations.items()}
    first: Mapping[str, Any] = {"start": start} if method.start else {}
    return replace(method, init=init, advance=advance, **first, **operations)
