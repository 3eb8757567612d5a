"""The policies of the planners that learn, by name, and how such a planner is created from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from fedtune.errors import ConfigError, Fault
from fedtune.planning.adaptive import Adaptive
from fedtune.planning.arms import (
    RATIOS,
    AdaptiveSettings,
    Setting,
    arms_of,
    backs_of,
    goal_of,
    ranks_of,
    shares_of,
    sparing_arms,
    tops_of,
)
from fedtune.planning.bandits import Thompson, Ucb
from fedtune.planning.deadline import Deadline
from fedtune.planning.floor import Floor
from fedtune.planning.planner import PlanChoices, Planner, PlannerInputs, PlannerType
from fedtune.planning.policy import Arm, Candidate, Policy
from fedtune.planning.random_choice import RandomChoice
from fedtune.planning.s_ucb import SUcb
from fedtune.pruning.depth import module_ranks
from fedtune.pruning.structure import FAMILIES

FEW_RATIOS, FEW_RANKS = (0.0, 0.25, 0.5), (4, 16)
"""Arms of `ucb`: a client takes part some tens of times, which is too few for all."""


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy reads beside its settings."""

    target: float = 0.0
    """The pruning ratio at which every client trains in the last rounds."""
    server_s: float = 0.0
    """Seconds of a round in which the server works."""
    true_seconds: Callable[[int, Candidate, Sequence[Arm]], Sequence[float]] | None = None
    """True seconds of a round's arms, for the oracle."""


def oracle(arms: tuple[Arm, ...], inputs: PolicyInputs) -> Deadline:
    assert inputs.true_seconds is not None  # config asks for a fleet
    return Deadline(arms, server_s=inputs.server_s, true_seconds=inputs.true_seconds)


POLICIES: Mapping[str, Callable[[AdaptiveSettings, tuple[Arm, ...], PolicyInputs], Policy[Any]]] = {
    "bandit": lambda settings, arms, inputs: Deadline(
        arms, draws=True, deadline_s=settings.deadline_s, server_s=inputs.server_s
    ),
    "deadline": lambda settings, arms, inputs: Deadline(
        arms, explore=settings.explore, deadline_s=settings.deadline_s, server_s=inputs.server_s
    ),
    "oracle": lambda settings, arms, inputs: oracle(arms, inputs),
    "s-ucb": lambda settings, arms, inputs: SUcb(arms),
    "ucb": lambda settings, arms, inputs: Ucb(few(arms, inputs.target), reward=settings.reward),
    "thompson": lambda settings, arms, inputs: Thompson(arms, reward=settings.reward),
    "random": lambda settings, arms, inputs: RandomChoice(arms),
}


def few(arms: tuple[Arm, ...], target: float = 0.0) -> tuple[Arm, ...]:
    """Return the arms nearest to the few, none twice; the target and the largest ratio are always among them."""
    ratios, ranks = sorted({arm.ratio for arm in arms}), sorted({arm.rank for arm in arms})
    # The target, or no arm would be left in the last rounds; the largest, for clients that can hold nothing more.
    wishes = (*FEW_RATIOS, target, ratios[-1])
    near = {min(ratios, key=lambda ratio: abs(ratio - wish)) for wish in wishes}
    of = {min(ranks, key=lambda rank: abs(rank - wish)) for wish in FEW_RANKS}
    # Of what leaves the forward pass whole: everything, and the least of each kind alone.
    least = (min(arm.top for arm in arms), max(arm.back for arm in arms), min(arm.share for arm in arms))
    whole = (max(arm.top for arm in arms), min(arm.back for arm in arms), max(arm.share for arm in arms))
    kinds = {whole, (least[0], *whole[1:]), (whole[0], least[1], whole[2]), (*whole[:2], least[2])}
    return tuple(
        arm for arm in arms if arm.ratio in near and arm.rank in of and (arm.top, arm.back, arm.share) in kinds
    )


def policy_of(settings: AdaptiveSettings, run: Setting, inputs: PolicyInputs | None = None) -> Policy[Any]:
    """Return the policy that a recipe's table `planner` names."""
    return POLICIES[settings.name](settings, arms_of(settings, run), inputs or PolicyInputs())


def create(settings: AdaptiveSettings, inputs: PlannerInputs) -> Planner:
    """Return the planner that learns, over the policy that the settings name.

    Raises:
        ConfigError: if there is no cost model for the base.
    """
    pruning, layout, modules = inputs.pruning, inputs.layout, tuple(sorted(inputs.modules))
    if inputs.costs is None:
        expected = f"a base of {', '.join(FAMILIES)}, for a planner that weighs costs"
        got = f"{inputs.base!r}, for which no cost model exists"
        raise ConfigError(Fault("planner", expected, got, 'set planner = "fixed"'))
    target = pruning.target if pruning else 0.0
    run = Setting(
        rank=inputs.training("")[0],
        target=target,
        pruned=pruning is not None,
        partial=inputs.partial and layout is not None,
        selective=inputs.selective and layout is not None,
    )
    policy = policy_of(settings, run, PolicyInputs(target, inputs.server_s, inputs.true_seconds))
    return Adaptive(
        policy=policy,
        training=lambda client: inputs.training(client)[1],
        costs=inputs.costs,
        traffic=inputs.traffic,
        speeds=inputs.speeds,
        alpha=inputs.alpha,
        rslora=inputs.rslora,
        seed=inputs.seed,
        floor=Floor(
            goal_of(settings, target),
            inputs.rounds,
            ratios=sorted({arm.ratio for arm in policy.arms}),
            pruning=pruning,
            ranking=inputs.ranking,
        ),
        sparing=sparing_arms(settings, policy.arms),
        # Asked for every client and arm: ten thousand clients share a few dozen answers.
        module_ranks=cache(lambda rank, top: module_ranks(modules, layout, rank, top) if layout else ()),
    )


def choices(settings: AdaptiveSettings, rank: int, ratio: float) -> PlanChoices:
    """Return what the arms hold; a client's own rank and ratio in the recipe count for nothing."""
    return PlanChoices(
        ranks=ranks_of(settings, rank),
        # The target is one of the ratios in any case; who permits an order adds it.
        ratios=tuple(RATIOS if settings.ratios is None else settings.ratios),
        shares=tuple(share for share in shares_of(settings) if share < 1),
        tops=tuple(top for top in tops_of(settings) if top < 1),
        backs=tuple(back for back in backs_of(settings) if back),
    )


def largest_rank(settings: AdaptiveSettings) -> int | None:
    """Return the largest rank that may be planned; None: the recipe's."""
    return None if settings.ranks is None else max(settings.ranks)


def planner_type(name: str) -> PlannerType:
    return PlannerType(name, AdaptiveSettings, create, largest_rank=largest_rank, choices=choices)
