"""The policies of the planners that learn, by name, and how such a planner is created from a recipe."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from fedtune.errors import ConfigError, Fault
from fedtune.planning.adaptive import Adaptive, AdaptiveSettings
from fedtune.planning.bandits import Thompson, Ucb
from fedtune.planning.deadline import Deadline
from fedtune.planning.planner import PlanChoices, Planner, PlannerInputs, PlannerType
from fedtune.planning.policy import Arm, Candidate, Policy
from fedtune.planning.random_choice import RandomChoice
from fedtune.planning.s_ucb import SUcb
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
    true_seconds: Callable[[int, Candidate], Sequence[float]] | None = None
    """True seconds of a round's arms, for the oracle."""


def oracle(arms: tuple[Arm, ...], inputs: PolicyInputs) -> Deadline:
    assert inputs.true_seconds is not None  # config asks for a fleet
    return Deadline(arms, server_s=inputs.server_s, true_seconds=inputs.true_seconds)


POLICIES: Mapping[str, Callable[[AdaptiveSettings, tuple[Arm, ...], PolicyInputs], Policy[Any]]] = {
    "deadline": lambda settings, arms, inputs: Deadline(
        arms, explore=settings.explore, deadline_s=settings.deadline_s, server_s=inputs.server_s
    ),
    "oracle": lambda settings, arms, inputs: oracle(arms, inputs),
    "s-ucb": lambda settings, arms, inputs: SUcb(arms),
    "ucb": lambda settings, arms, inputs: Ucb(few(arms, inputs.target), reward=settings.reward),
    "thompson": lambda settings, arms, inputs: Thompson(arms, reward=settings.reward),
    "random": lambda settings, arms, inputs: RandomChoice(arms),
}


def arms_of(settings: AdaptiveSettings, *, pruned: bool) -> tuple[Arm, ...]:
    """Return the arms that settings list: every ratio with every rank; without pruning only the ratio 0."""
    # Sorted, each once: ties go to the lower index, so the order of a recipe's list must not matter.
    ratios = sorted(set(settings.ratios)) if pruned else [0.0]
    return tuple(Arm(ratio, rank) for ratio, rank in product(ratios, sorted(set(settings.ranks))))


def few(arms: tuple[Arm, ...], target: float = 0.0) -> tuple[Arm, ...]:
    """Return the arms nearest to the few, none twice; the target and the largest ratio are always among them."""
    ratios, ranks = sorted({arm.ratio for arm in arms}), sorted({arm.rank for arm in arms})
    # The target, or no arm would be left in the last rounds; the largest, for clients that can hold nothing more.
    wishes = (*FEW_RATIOS, target, ratios[-1])
    near = {min(ratios, key=lambda ratio: abs(ratio - wish)) for wish in wishes}
    of = {min(ranks, key=lambda rank: abs(rank - wish)) for wish in FEW_RANKS}
    return tuple(arm for arm in arms if arm.ratio in near and arm.rank in of)


def policy_of(settings: AdaptiveSettings, *, pruned: bool, inputs: PolicyInputs | None = None) -> Policy[Any]:
    """Return the policy that a recipe's table `planner` names; `pruned`: there are ratios to choose from."""
    return POLICIES[settings.name](settings, arms_of(settings, pruned=pruned), inputs or PolicyInputs())


def create(settings: AdaptiveSettings, inputs: PlannerInputs) -> Planner:
    """Return the planner that learns, over the policy that the settings name.

    Raises:
        ConfigError: if there is no cost model for the base.
    """
    pruning = inputs.pruning
    if inputs.costs is None:
        expected = f"a base of {', '.join(FAMILIES)}, for a planner that weighs costs"
        got = f"{inputs.base!r}, for which no cost model exists"
        raise ConfigError(Fault("planner", expected, got, 'set planner = "fixed"'))
    return Adaptive(
        policy=policy_of(
            settings,
            pruned=pruning is not None,
            inputs=PolicyInputs(pruning.target if pruning else 0.0, inputs.server_s, inputs.true_seconds),
        ),
        training=lambda client: inputs.training(client)[1],
        costs=inputs.costs,
        traffic=inputs.traffic,
        speeds=inputs.speeds,
        alpha=inputs.alpha,
        rslora=inputs.rslora,
        seed=inputs.seed,
        rounds=inputs.rounds,
        pruning=pruning,
        ranking=inputs.ranking,
    )


def choices(settings: AdaptiveSettings, rank: int, ratio: float) -> PlanChoices:
    """Return the ranks and ratios of the arms; a client's own in the recipe count for nothing."""
    return PlanChoices(ranks=tuple(settings.ranks), ratios=tuple(settings.ratios))


def planner_type(name: str) -> PlannerType:
    return PlannerType(
        name, AdaptiveSettings, create, largest_rank=lambda settings: max(settings.ranks), choices=choices
    )
