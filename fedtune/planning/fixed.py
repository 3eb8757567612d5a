"""The planner `fixed`: the recipe's rank, steps and batch for every client, as its overrides say."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Interval

from fedtune.messages import OMIT_DEFAULT, Client, Failure, Plan, PlannedClient, Training
from fedtune.planning.planner import (
    ClientObservation,
    PlanChoices,
    PlannerInputs,
    PlannerType,
    fits,
    lora_scale,
    optimizer_steps,
    plan_arm,
    with_verb,
)
from fedtune.planning.policy import Arm
from fedtune.planning.verbs import DESCENDING, Misfit, VerbRequest, fits_everywhere, no_request, where_it_fits
from fedtune.pruning.structure import BlockLayout


@dataclass(frozen=True)
class FixedSettings:
    """Settings of the planner `fixed`: every round, each client trains as the recipe and its overrides say."""

    name: Literal["fixed"] = "fixed"
    """Name of the planner."""
    ratio: Annotated[float, Interval(ge=0, le=0.875)] = 0.0
    """Pruning ratio of every client that no `[[override]]` names; above 0 it needs the table `pruning`."""
    top: Annotated[float, Interval(gt=0, le=1)] = field(default=1.0, metadata=OMIT_DEFAULT)
    """Share of the blocks, from the top, whose modules are trained and sent; backward passes stop below them. At least
    one block is. Below 1 it needs a method that sums up any modules (flora)."""
    back: Annotated[float, Interval(ge=0, le=0.875)] = field(default=0.0, metadata=OMIT_DEFAULT)
    """Share of each block's heads and channels that backward passes leave out; forward passes are whole."""
    down_rank: Annotated[int, Ge(1)] | None = field(default=None, metadata=OMIT_DEFAULT)
    """Largest rank of the global change that a client is sent, with `flora`; none: as `method.down_rank` says."""


@dataclass(frozen=True)
class Fixed:
    """Plans that do not depend on the round or on what was measured."""

    training: Callable[[str], tuple[int, Training]]
    """client -> its LoRA rank and how it trains"""
    alpha: float | Literal["2r"]
    rslora: bool
    ratio: Callable[[str], float] = lambda client: 0.0
    """client -> its pruning ratio"""
    ranking: bool = True
    """Whether heads and channels are ranked from the start: else no client is pruned in the first round."""
    arm: Callable[[str], Arm] = lambda client: Arm(0.0, 1)
    """client -> what its plan says beside rank, ratio and training"""
    modules: Collection[str] = ()
    layout: BlockLayout | None = None
    misfit: Callable[[Client, Arm, Training], str] = fits
    """(client, arm, training) -> why that does not fit its device; empty if it does, or is not known"""
    verb: Callable[[str], VerbRequest] = no_request
    """client -> what it does, where clients of the method may differ in it"""
    misfit_descending: Misfit = fits_everywhere
    """(client, how it descends) -> the same of descending"""

    def start(self) -> None:
        """Return None: nothing is learned."""

    def plan(self, learned: Any, round: int, cohort: Sequence[Client]) -> Mapping[str, PlannedClient | Failure]:
        """Return one plan per client of the cohort; epochs become steps by the client's number of examples."""
        return {client.name: self.fitting_plan(client, pruned=self.ranking or round > 1) for client in cohort}

    def observe(self, learned: Any, seen: Sequence[ClientObservation]) -> None:
        """Learn nothing."""

    def fitting_plan(self, client: Client, *, pruned: bool) -> PlannedClient | Failure:
        """Return the plan of one client, or why it does not fit its device."""
        planned = self.planned_for(client, pruned=pruned)
        placed = where_it_fits(planned, client, self.misfit_descending)
        if isinstance(placed, Failure) or placed.verb in DESCENDING:
            return placed
        planned, plan = placed, placed.plan
        # With what it leaves out of the backward pass: that may be why it fits.
        arm = replace(self.arm(client.name), ratio=plan.ratio, rank=plan.rank, share=1.0)
        if why := self.misfit(client, arm, plan.training):
            return Failure.from_text(client.name, why, kind="unfit")
        # Where the whole model does not fit, the loss before training is measured in the pruned one as well.
        whole_fits = plan.ratio == 0 or not self.misfit(client, replace(arm, ratio=0.0), plan.training)
        return replace(planned, first_ratio=0.0 if whole_fits else plan.ratio)

    def plan_for(self, client: Client, *, pruned: bool = True) -> Plan:
        """Return the plan of one client, whether it fits its device or not."""
        return self.planned_for(client, pruned=pruned).plan

    def planned_for(self, client: Client, *, pruned: bool = True) -> PlannedClient:
        """Return the same with what stays on the server."""
        rank, training = self.training(client.name)
        ratio = self.ratio(client.name) if pruned else 0.0
        planned = plan_arm(
            client.name,
            replace(self.arm(client.name), ratio=ratio, rank=rank, share=1.0),
            replace(training, steps=optimizer_steps(training, client.num_examples), epochs=None),
            scale=lora_scale(rank, self.alpha, rslora=self.rslora),
            modules=self.modules,
            layout=self.layout,
        )
        return with_verb(planned, self.verb(client.name), client)


def create(settings: FixedSettings, inputs: PlannerInputs) -> Fixed:
    """Return the planner of a recipe."""
    return Fixed(
        inputs.training,
        alpha=inputs.alpha,
        rslora=inputs.rslora,
        ratio=inputs.ratio,
        # With local scores every client ranks for itself, so none has to wait for a first round.
        ranking=inputs.ranking or inputs.pruning is None or inputs.pruning.policy == "local",
        arm=inputs.arm,
        modules=inputs.modules,
        layout=inputs.layout,
        misfit=inputs.misfit,
        verb=inputs.verb,
        misfit_descending=inputs.misfit_descending,
    )


def choices(settings: FixedSettings, rank: int, ratio: float) -> PlanChoices:
    """Return what is chosen: as the recipe and its overrides say."""
    return PlanChoices(ranks=(rank,), ratios=(ratio,))


PLANNER = PlannerType("fixed", FixedSettings, create, choices=choices)
