"""The planner `fixed`: the recipe's rank, steps and batch for every client, as its overrides say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Literal

from fedtune.round import Client, Plan, Training


@dataclass(frozen=True)
class FixedSettings:
    """Settings of the planner `fixed`; it has none of its own."""

    name: Literal["fixed"] = "fixed"


@dataclass(frozen=True)
class Fixed:
    """Plans that do not depend on the round or on what was measured."""

    asked: Callable[[str], tuple[int, Training]]
    """From a client's name, whoever takes part, to its LoRA rank and how it trains."""
    alpha: float | Literal["2r"]
    rslora: bool

    def plan(self, round: int, cohort: Sequence[Client]) -> Mapping[str, Plan]:
        """Return one plan per client of the cohort; epochs become steps by the client's number of examples."""
        return {client.name: self._plan(client) for client in cohort}

    def _plan(self, client: Client) -> Plan:
        rank, training = self.asked(client.name)
        alpha = 2.0 * rank if self.alpha == "2r" else self.alpha
        return Plan(
            client=client.name,
            rank=rank,
            scale=alpha / (sqrt(rank) if self.rslora else rank),
            training=replace(training, steps=steps(training, client.num_examples), epochs=None),
        )


def steps(training: Training, num_examples: int) -> int:
    """Return the optimizer steps of one round: as given, or epochs over the client's examples, rounded up."""
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None  # config binds exactly one of the two
    return max(1, ceil(training.epochs * num_examples / (training.batch * training.accumulation)))
