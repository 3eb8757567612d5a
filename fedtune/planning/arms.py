"""The arms of the planners that learn: which pruning ratios, ranks, blocks and steps there are to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Annotated, Literal, TypeAlias

from annotated_types import Ge, Gt, Interval

from fedtune.messages import OMIT_DEFAULT
from fedtune.planning.policy import Arm

PolicyName: TypeAlias = Literal["bandit", "deadline", "s-ucb", "ucb", "thompson", "random", "oracle"]
Goal: TypeAlias = Literal["whole", "deployed", "both"]
"""Whose loss a planner lowers."""
RATIOS = (0.0, 0.25, 0.5, 0.75)
TOPS, BACKS, SHARES = (1.0, 0.6, 0.4), (0.0, 0.5), (1.0, 0.5, 0.25)
RANK_SHARES = (0.25, 0.5, 1.0)
"""Of `adapter.rank`."""


@dataclass(frozen=True)
class AdaptiveSettings:
    """Settings of the planners that choose an *arm* for every client and round: of the model what is pruned, what is
    trained and what the backward pass leaves out, the rank, the share of the steps, and the rank that is sent.

    The arms are all combinations of the lists. An arm with a pruning ratio above 0 trains all blocks that are left.
    """

    name: PolicyName = "bandit"
    """bandit: samples what arms are worth from what all rounds have taught, and lets the cohort end together (Thompson
    sampling over the cost model); deadline: the same with the mean in place of a sample; s-ucb: a tree of arms per
    client (FedSpine-style, formula ours); ucb, thompson: a bandit per client over the arms; random: any arm that fits;
    oracle: deadline with the simulated clock's true times, for comparisons (needs `fleet.by = "round"`)."""
    # Written into every recipe's text: those of releases before 0.3.0, which had other arms, are known by its absence.
    goal: Literal["auto", "whole", "deployed", "both"] = "auto"
    """Whose loss is to fall: that of the whole model, of the pruned one that is deployed, or of both. auto: both where
    `pruning.target` is above 0, else whole. Unless it is whole, clients that deploy the pruned model train at that
    ratio in the last fifth of the rounds; before, and for all others, every arm is free."""
    ratios: Sequence[Annotated[float, Interval(ge=0, le=0.875)]] | None = field(default=None, metadata=OMIT_DEFAULT)
    """Pruning ratios to choose from, for clients whose memory does not hold the whole base, or that deploy it pruned;
    without the table `pruning` there is only 0. none: 0, 0.25, 0.5, 0.75 and `pruning.target`."""
    ranks: Sequence[Annotated[int, Ge(1)]] | None = field(default=None, metadata=OMIT_DEFAULT)
    """LoRA ranks to choose from; none: `adapter.rank`, a half and a quarter of it."""
    tops: Sequence[Annotated[float, Interval(gt=0, le=1)]] | None = field(default=None, metadata=OMIT_DEFAULT)
    """Shares of the blocks, from the top, whose adapters are trained: below them is no backward pass; rounded to at
    least one block. none: 1, and for clients whose memory holds no arm that trains all 0.6 and 0.4, where the method
    takes updates without some modules."""
    backs: Sequence[Annotated[float, Interval(ge=0, le=0.875)]] | None = field(default=None, metadata=OMIT_DEFAULT)
    """Shares of each block's heads and channels that backward passes leave out; none: 0, and 0.5 for clients whose
    memory holds no arm that leaves nothing out."""
    shares: Sequence[Annotated[float, Interval(gt=0, le=1)]] | None = field(default=None, metadata=OMIT_DEFAULT)
    """Shares of the steps that are taken, at least one step; none: 1, 0.5 and 0.25."""
    down_ranks: Sequence[Annotated[int, Ge(1)]] | None = field(default=None, metadata=OMIT_DEFAULT)
    """Largest ranks of the global change that clients are sent; none: as the method's own settings say."""
    probe: bool = field(default=False, metadata=OMIT_DEFAULT)
    """Simulated devices measure their speed before every round, by a fixed matrix product and a megabyte, in at most a
    twentieth of a mean round, which the clock counts; real clients by the product alone, when they check in. For the
    planners bandit and deadline, where few of many clients take part in a round. Clients that run on this machine
    without `fleet` are not asked: they would all measure the same machine."""
    explore: Annotated[int, Ge(0)] = 0
    """With deadline: clients per round that try another arm that still ends in time."""
    deadline_s: Annotated[float, Gt(0)] | None = None
    """With bandit and deadline: seconds that every round is to take; none lets the planner choose."""
    reward: Literal["time", "fedmp"] = "time"
    """With ucb and thompson. time: only clients slower than the cohort's median lose; fedmp: the fall of the loss,
    divided by the distance from the cohort's mean time, as in FedMP."""


@dataclass(frozen=True)
class Setting:
    """What of a run the arms depend on, beside the settings."""

    rank: int
    """`adapter.rank`."""
    target: float = 0.0
    """`pruning.target`."""
    pruned: bool = False
    """Whether the recipe has the table `pruning`."""
    partial: bool = True
    """Whether the method takes updates that leave modules out."""
    selective: bool = True
    """Whether backward passes can leave out a part of the blocks of this base."""


def ratios_of(settings: AdaptiveSettings, *, pruned: bool, target: float) -> Sequence[float]:
    """Return the pruning ratios there are, ascending."""
    if not pruned:
        return (0.0,)
    return sorted({*RATIOS, target} if settings.ratios is None else set(settings.ratios))


def ranks_of(settings: AdaptiveSettings, rank: int) -> Sequence[int]:
    """Return the ranks there are, ascending; `rank`: the recipe's."""
    if settings.ranks is None:
        return sorted({max(1, int(share * rank + 0.5)) for share in RANK_SHARES})
    return sorted(set(settings.ranks))


def tops_of(settings: AdaptiveSettings, *, partial: bool = True) -> Sequence[float]:
    """Return the shares of trained blocks there are, descending."""
    usual = TOPS if partial else (1.0,)
    return sorted(set(usual if settings.tops is None else settings.tops), reverse=True)


def backs_of(settings: AdaptiveSettings, *, selective: bool = True) -> Sequence[float]:
    """Return the shares that backward passes may leave out, ascending."""
    usual = BACKS if selective else (0.0,)
    return sorted(set(usual if settings.backs is None else settings.backs))


def shares_of(settings: AdaptiveSettings) -> Sequence[float]:
    """Return the shares of the steps there are, descending."""
    return sorted(set(SHARES if settings.shares is None else settings.shares), reverse=True)


def down_ranks_of(settings: AdaptiveSettings) -> Sequence[int | None]:
    """Return the ranks that are sent, ascending; None: as the method says."""
    return (None,) if settings.down_ranks is None else sorted(set(settings.down_ranks))


def arms_of(settings: AdaptiveSettings, run: Setting) -> tuple[Arm, ...]:
    """Return the arms that settings list, each once.

    Sorted, whatever the order of a recipe's lists: ties go to the lower index.
    """
    arms = []
    for ratio, rank, top, back, share, down in product(
        ratios_of(settings, pruned=run.pruned, target=run.target),
        ranks_of(settings, run.rank),
        tops := tops_of(settings, partial=run.partial),
        backs := backs_of(settings, selective=run.selective),
        shares_of(settings),
        down_ranks_of(settings),
    ):
        # A device that cannot hold the whole base has no use for arms that leave the forward pass whole; together they
        # would be as many arms again that hardly differ in what they take.
        if ratio == 0 or (top == tops[0] and back == backs[0]):
            arms.append(Arm(ratio, rank, top, back, share, down))
    return tuple(arms)


def sparing_arms(settings: AdaptiveSettings, arms: Sequence[Arm]) -> frozenset[Arm]:
    """Return the arms that are there by default for the memory that they save.

    For the time that they take, fewer steps teach as much: see docs/benchmarks.md.
    """
    return frozenset(
        arm for arm in arms if (arm.top < 1 and settings.tops is None) or (arm.back > 0 and settings.backs is None)
    )


def compute_share(arm: Arm) -> float:
    """Return about which share of the whole model's operations an arm takes: half is forward, half backward.

    >>> compute_share(Arm(0.0, 8, top=0.5, back=0.5, share=0.5)), compute_share(Arm(0.25, 8))
    (0.3125, 0.75)
    """
    return (1 - arm.ratio) * 0.5 * (1 + arm.top * (1 - arm.back)) * arm.share


def goal_of(settings: AdaptiveSettings, target: float) -> Goal:
    """Return whose loss is to fall; `target`: the pruning ratio that is deployed, 0 for none."""
    if settings.goal == "auto":
        return "both" if target else "whole"
    return settings.goal
