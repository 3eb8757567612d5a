"""The planner `fixed`: the recipe's rank, steps and batch for every client, as its overrides say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, sqrt
from typing import Annotated, Any, Literal

from annotated_types import Interval

from fedtune.messages import Client, Failure, Plan, PlannedClient, Training
from fedtune.planning.planner import ClientObservation


@dataclass(frozen=True)
class FixedSettings:
    """Settings of the planner `fixed`."""

    name: Literal["fixed"] = "fixed"
    """Name of the planner."""
    ratio: Annotated[float, Interval(ge=0, le=0.875)] = 0.0
    """Pruning ratio of every client that no override names; above 0 it needs the table `pruning`."""


@dataclass(frozen=True)
class Fixed:
    """Plans that do not depend on the round or on what was measured."""

    asked: Callable[[str], tuple[int, Training]]
    """From a client's name, whoever takes part, to its LoRA rank and how it trains."""
    alpha: float | Literal["2r"]
    rslora: bool
    ratio: Callable[[str], float] = lambda client: 0.0
    """From a client's name to its pruning ratio."""
    scored: bool = True
    """Whether heads and channels can be told apart from the start: else the first round prunes nobody."""
    misfit: Callable[[Client, float, int, Training], str] = lambda client, ratio, rank, training: ""
    """Why a ratio and a rank do not fit a client's device; empty where they do, or where it is not known."""

    def start(self) -> None:
        """Return nothing: it learns nothing."""

    def plan(self, learned: Any, round: int, cohort: Sequence[Client]) -> Mapping[str, PlannedClient | Failure]:
        """Return one plan per client of the cohort; epochs become steps by the client's number of examples."""
        plans = {client: self.plan_for(client, pruned=self.scored or round > 1) for client in cohort}
        return {client.name: self._checked(client, plan) for client, plan in plans.items()}

    def _checked(self, client: Client, plan: Plan) -> PlannedClient | Failure:
        """Return the plan if it fits the client's device, otherwise why not."""
        if why := self.misfit(client, plan.ratio, plan.rank, plan.training):
            return Failure.from_text(client.name, why, kind="unfit")
        whole_fits = plan.ratio == 0 or not self.misfit(client, 0.0, plan.rank, plan.training)
        return PlannedClient(plan, first_ratio=0.0 if whole_fits else plan.ratio)

    def observe(self, learned: Any, seen: Sequence[ClientObservation]) -> None:
        """Learn nothing."""

    def plan_for(self, client: Client, *, pruned: bool = True) -> Plan:
        """Return the plan of one client, whether it fits its device or not."""
        rank, training = self.asked(client.name)
        return Plan(
            client=client.name,
            rank=rank,
            scale=scale(rank, self.alpha, rslora=self.rslora),
            training=replace(training, steps=steps(training, client.num_examples), epochs=None),
            ratio=self.ratio(client.name) if pruned else 0.0,
        )


def scale(rank: int, alpha: float | Literal["2r"], *, rslora: bool) -> float:
    """Return the LoRA scale of a rank: alpha / rank, or alpha / sqrt(rank)."""
    numerator = 2.0 * rank if alpha == "2r" else alpha
    return numerator / (sqrt(rank) if rslora else rank)


def steps(training: Training, num_examples: int) -> int:
    """Return the optimizer steps of one round: as given, or epochs over the client's examples, rounded up."""
    if training.steps is not None:
        return training.steps
    assert training.epochs is not None  # config binds exactly one of the two
    return max(1, ceil(training.epochs * num_examples / (training.batch * training.accumulation)))
