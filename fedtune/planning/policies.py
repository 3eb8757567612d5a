"""The table of policies: from a planner's settings to what chooses its arms."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from fedtune.planning.adaptive import AdaptiveSettings
from fedtune.planning.bandits import Thompson, Ucb
from fedtune.planning.deadline import Deadline
from fedtune.planning.policy import Arm, Candidate, Policy
from fedtune.planning.tree import STree
from fedtune.planning.uniform import Uniform

FEW_RATIOS, FEW_RANKS = (0.0, 0.25, 0.5), (4, 16)
"""Arms of `ucb`: a client takes part some tens of times, which is too few for all."""

POLICIES: Mapping[str, Callable[[AdaptiveSettings, tuple[Arm, ...]], Policy[Any]]] = {
    "deadline": lambda settings, arms: Deadline(arms, explore=settings.explore, deadline_s=settings.deadline_s),
    "oracle": lambda settings, arms: Deadline(arms),
    "s-ucb": lambda settings, arms: STree(arms),
    "ucb": lambda settings, arms: Ucb(few(arms), reward=settings.reward),
    "thompson": lambda settings, arms: Thompson(arms, reward=settings.reward),
    "random": lambda settings, arms: Uniform(arms),
}


def arms_of(settings: AdaptiveSettings, *, pruned: bool) -> tuple[Arm, ...]:
    """Return what there is to choose from; without pruning only the rank is."""
    ratios = sorted(set(settings.ratios)) if pruned else [0.0]
    return tuple(Arm(ratio, rank) for ratio, rank in product(ratios, sorted(set(settings.ranks))))


def few(arms: tuple[Arm, ...]) -> tuple[Arm, ...]:
    """Return the arms nearest to the few, none twice; the largest ratio is always among them."""
    ratios, ranks = sorted({arm.ratio for arm in arms}), sorted({arm.rank for arm in arms})
    near = {min(ratios, key=lambda ratio: abs(ratio - wish)) for wish in FEW_RATIOS} | {ratios[-1]}
    of = {min(ranks, key=lambda rank: abs(rank - wish)) for wish in FEW_RANKS}
    return tuple(arm for arm in arms if arm.ratio in near and arm.rank in of)


def policy_of(
    settings: AdaptiveSettings,
    *,
    pruned: bool,
    known: Callable[[int, Candidate], Sequence[float]] | None = None,
    server_s: float = 0.0,
) -> Policy[Any]:
    """Return what chooses the arms of a recipe.

    Args:
        settings: the recipe's table `planner`.
        pruned: whether there are ratios to choose from.
        known: true seconds of a round's arms, for the oracle.
        server_s: of a round.
    """
    arms = arms_of(settings, pruned=pruned)
    if settings.name == "oracle":
        assert known is not None  # config asks for a fleet
        return Deadline(arms, server_s=server_s, known=known)
    policy = POLICIES[settings.name](settings, arms)
    return replace(policy, server_s=server_s) if isinstance(policy, Deadline) else policy
