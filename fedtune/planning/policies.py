"""The table of policies: from a planner's settings to what chooses its arms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from fedtune.planning.adaptive import AdaptiveSettings
from fedtune.planning.bandits import Thompson, Ucb
from fedtune.planning.deadline import Deadline
from fedtune.planning.policy import Arm, Candidate, Policy
from fedtune.planning.random_choice import RandomChoice
from fedtune.planning.s_ucb import SUcb

FEW_RATIOS, FEW_RANKS = (0.0, 0.25, 0.5), (4, 16)
"""Arms of `ucb`: a client takes part some tens of times, which is too few for all."""


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy is told beside its settings."""

    target: float = 0.0
    """The ratio that all train at in the end."""
    server_s: float = 0.0
    """Of a round."""
    known: Callable[[int, Candidate], Sequence[float]] | None = None
    """True seconds of a round's arms, for the oracle."""


def oracle(arms: tuple[Arm, ...], given: PolicyInputs) -> Deadline:
    assert given.known is not None  # config asks for a fleet
    return Deadline(arms, server_s=given.server_s, known=given.known)


POLICIES: Mapping[str, Callable[[AdaptiveSettings, tuple[Arm, ...], PolicyInputs], Policy[Any]]] = {
    "deadline": lambda settings, arms, given: Deadline(
        arms, explore=settings.explore, deadline_s=settings.deadline_s, server_s=given.server_s
    ),
    "oracle": lambda settings, arms, given: oracle(arms, given),
    "s-ucb": lambda settings, arms, given: SUcb(arms),
    "ucb": lambda settings, arms, given: Ucb(few(arms, given.target), reward=settings.reward),
    "thompson": lambda settings, arms, given: Thompson(arms, reward=settings.reward),
    "random": lambda settings, arms, given: RandomChoice(arms),
}


def arms_of(settings: AdaptiveSettings, *, pruned: bool) -> tuple[Arm, ...]:
    """Return what there is to choose from; without pruning only the rank is."""
    ratios = sorted(set(settings.ratios)) if pruned else [0.0]
    return tuple(Arm(ratio, rank) for ratio, rank in product(ratios, sorted(set(settings.ranks))))


def few(arms: tuple[Arm, ...], target: float = 0.0) -> tuple[Arm, ...]:
    """Return the arms nearest to the few, none twice; the target and the largest ratio are always among them."""
    ratios, ranks = sorted({arm.ratio for arm in arms}), sorted({arm.rank for arm in arms})
    wishes = (*FEW_RATIOS, target, ratios[-1])
    near = {min(ratios, key=lambda ratio: abs(ratio - wish)) for wish in wishes}
    of = {min(ranks, key=lambda rank: abs(rank - wish)) for wish in FEW_RANKS}
    return tuple(arm for arm in arms if arm.ratio in near and arm.rank in of)


def policy_of(settings: AdaptiveSettings, *, pruned: bool, given: PolicyInputs | None = None) -> Policy[Any]:
    """Return what chooses the arms of a recipe.

    Args:
        settings: the recipe's table `planner`.
        pruned: whether there are ratios to choose from.
        given: what else a policy may want to know.
    """
    return POLICIES[settings.name](settings, arms_of(settings, pruned=pruned), given or PolicyInputs())
