"""The ranking of heads and channels by scores pooled over clients, and what a pruning ratio keeps of a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Literal, TypeAlias

import numpy as np
from annotated_types import Ge, Interval

from fedtune.errors import ShapeError
from fedtune.pruning.structure import Block, BlockLayout, BlockStructure, ModelStructure
from fedtune.tensors import Array, Tensors

Unit: TypeAlias = Literal["kv_group", "even_q"]
Criterion: TypeAlias = Literal["wanda", "lora", "gate", "magnitude", "random"]

OMIT_DEFAULT = {"omit_default": True}
"""As `messages.OMIT_DEFAULT`, which lies above."""
SWAP = 0.1
"""Share by which a pooled score must change before the ranking follows: equal groups do not swap every round."""
LARGEST_WORTH = 10.0
"""Times the cohort's median of a unit, or times the mean unit, that one client's score of it counts at most."""
ON_SERVER_ALONE: Mapping[str, bool] = {"travels": False, "omit_default": True}
"""Metadata of a setting that clients are not sent, and that recipes before it did not have; see `messages`."""
LEAST = 8
"""A block keeps at least 1/8 of its channels."""
REPAIR_PERIOD = 2
"""Rounds between two that train the repair adapter; the first round ranks heads and channels, and trains the whole."""


@dataclass(frozen=True)
class PruningSettings:
    """How clients' models are made smaller; the recipe's table `pruning`.

    The planner chooses the pruning ratio of each client; this table says which heads and channels a ratio removes.
    FedSpine-style; the formulas are ours.
    """

    target: Annotated[float, Interval(ge=0, le=0.875)] = 0.5
    """Pruning ratio of the model that is scored and exported beside the whole one; 0: none. Clients that will use it
    train at this ratio in the last fifth of the rounds, unless `planner.goal` is whole."""
    deployed_on: Sequence[str] = field(default=(), metadata=ON_SERVER_ALONE)
    """Clients that will use the pruned model: names or globs of clients, or of device profiles. none: those whose
    memory does not hold the whole base; all, where `planner.goal` is deployed."""
    floor: Literal["deployed", "ramp"] = field(default="deployed", metadata=ON_SERVER_ALONE)
    """The smallest ratio that a planner may choose. deployed: `target` for the clients above in the last fifth of the
    rounds, 0 before that and for all others; ramp: for all clients, as in releases before 0.3.0, which costs the whole
    model much."""
    ramp: Annotated[float, Interval(gt=0, le=1)] = 0.8
    """With the floor ramp: share of the rounds over which the smallest ratio rises from 0 to `target`, along a cubic
    curve; after that all train at `target`."""
    policy: Literal["nested", "local", "vote"] = "nested"
    """nested: the server has one ranking, and every smaller model is part of every larger one; vote: clients vote in
    each round, and all share the result; local: each client ranks by its own data."""
    score: Criterion = "wanda"
    """How important a head or channel is. wanda: weights times activations, by forward passes; lora and gate: by
    backward passes; magnitude: of the weights alone; random: as a baseline."""
    batches: Annotated[int, Ge(1)] = 20
    """Forward passes that a client scores heads and channels with."""
    refresh: Annotated[int, Ge(0)] = 0
    """Rounds after which clients score again, with nested and vote; 0 scores once. A new ranking loses what was
    regained under the old one."""
    unit: Literal["auto", "kv_group", "even_q"] = "auto"
    """What is removed from attention at once. kv_group: a key/value head with its query heads; even_q: one query head
    of every group; auto: whole groups where a block has enough of them to choose from."""
    allocation: Literal["auto", "global", "uniform"] = "auto"
    """global: heads are ranked over all blocks, so blocks may keep different numbers; uniform: every block keeps as
    many; auto: uniform for the score magnitude, else global."""
    multiple: Annotated[int, Ge(1)] | Literal["auto"] = "auto"
    """Every block keeps a multiple of so many feed-forward channels; auto: 32, or less where a block has fewer than 256
    channels."""
    stages: Annotated[int, Interval(ge=1, le=64)] = 1
    """Steps within a round in which a client's model shrinks to its ratio."""
    steps_between: Annotated[int, Ge(1)] = 20
    """Optimizer steps that a client trains between two stages."""
    ranking: str | None = None
    """File `pruning.json` of an earlier export whose ranking is used; none: clients score before anything is removed.
    """
    repair: Literal["none", "bias", "least-squares"] = field(default="none", metadata=OMIT_DEFAULT)
    """How layers make up for the heads and channels that they lose, in training and in what is deployed, at no cost in
    a forward pass. least-squares: what is kept stands in for the rest, by the second moments of both; bias: their mean
    does (FLAP, arXiv 2312.11983); none: not at all. Clients that hold the whole model measure the moments with the
    scores; pruned ones are sent them in every round, which slow networks feel."""
    adapters: Literal["one", "two"] = field(default="one", metadata=OMIT_DEFAULT)
    """two: in every second round clients train a second adapter, in the deployed structure (`target`) beside the first
    one, which is frozen there. It makes up for what the deployed model lacks, is exported with it, and never added to
    the whole model. one: what pruned clients learn enters the whole model as well."""
    repair_rank: Annotated[int, Interval(ge=1, le=4096)] = field(default=128, metadata=OMIT_DEFAULT)
    """With least-squares: columns that the covariance of a layer's inputs is cut to before it travels. Exact from the
    layer's width on."""

    @property
    def everywhere(self) -> bool:
        """Whether all blocks keep as much."""
        # Blocks do not compare by magnitude: ranked over all of them, a toy model lost more than by random scores.
        return self.allocation == "uniform" or (self.allocation == "auto" and self.score == "magnitude")

    def ratio(self, round: int, rounds: int) -> float:
        """Return the least block sparsity of a round: target (1 - (1 - min(1, t / (ramp T)))^3)."""
        return self.target * float(1 - (1 - min(1.0, round / max(1.0, self.ramp * rounds))) ** 3)


Settings: TypeAlias = PruningSettings


def is_repair_round(settings: Settings | None, round: int) -> bool:
    """Return whether clients train the repair adapter in a round."""
    return settings is not None and settings.adapters == "two" and round % REPAIR_PERIOD == 0


def unit_of(settings: Settings, block: Block) -> Unit:
    """Return what goes at once: auto takes whole groups where there are enough of them to choose from."""
    if settings.unit != "auto":
        return settings.unit
    # With few groups a ratio would be coarse: Qwen2.5-0.5B has two, SmolLM2-135M three.
    return "kv_group" if block.group == 1 or (block.group <= 4 and block.kv_heads >= 4) else "even_q"


def multiple_of(settings: Settings, block: Block) -> int:
    if settings.multiple != "auto":
        return settings.multiple
    # At multiples of 32 a narrow block would have too few widths to choose from.
    return min(32, 1 << max(0, (block.channels // LEAST).bit_length() - 1))


def units_of(settings: Settings, block: Block) -> int:
    """Return how many attention units a block has."""
    return block.kv_heads if unit_of(settings, block) == "kv_group" else block.group


@dataclass(frozen=True)
class Counts:
    """How many heads and channels a ratio keeps; costs, bytes and memory depend on nothing else."""

    units: tuple[int, ...] | None
    """Attention units by block; None where blocks may differ, and only `total` is settled."""
    total: int
    """Attention units over all blocks."""
    channels: tuple[int, ...]
    """By block."""


def counts(layout: BlockLayout, settings: Settings, ratio: float) -> Counts:
    """Return how many units and channels are left at a ratio in [0, 1); never less for a smaller ratio."""
    sizes = [units_of(settings, block) for block in layout.blocks]
    channels = tuple(channels_kept(block, multiple_of(settings, block), ratio) for block in layout.blocks)
    # At least one unit is left in every block: attention without a head is no attention.
    if settings.everywhere:
        units = tuple(max(1, half_up((1 - ratio) * size)) for size in sizes)
        return Counts(units=units, total=sum(units), channels=channels)
    return Counts(units=None, total=max(len(sizes), half_up((1 - ratio) * sum(sizes))), channels=channels)


def half_up(number: float) -> int:
    # Not `round`, which rounds halves to the even number: a count must not depend on its neighbour's parity.
    return int(number + 0.5)


def channels_kept(block: Block, multiple: int, ratio: float) -> int:
    """Return the channels left: a multiple of `multiple`, at least an eighth; all of them at 0."""
    if ratio == 0:
        return block.channels
    least = -(-block.channels // LEAST)
    wanted = half_up((1 - ratio) * block.channels / multiple) * multiple
    return min(block.channels, max(wanted, -(-least // multiple) * multiple))


@dataclass(frozen=True)
class Ranking:
    """Heads and channels in the order of their importance, the best first."""

    attention: tuple[tuple[int, tuple[int, ...]], ...]
    """(block, the unit's query heads) over all blocks; every block's best one comes before all others."""
    channels: tuple[tuple[int, ...], ...]
    """By block."""


def split_by_block(scores: Tensors, layout: BlockLayout) -> tuple[Sequence[Array], Sequence[Array]]:
    """Return (scores of query heads, scores of channels) by block, from `heads` and `channels` over all blocks.

    Raises:
        ShapeError: if they are not as long as the base is wide.
    """
    parts = []
    for name, sizes in (
        ("heads", [block.heads for block in layout.blocks]),
        ("channels", [block.channels for block in layout.blocks]),
    ):
        if scores.keys() != {"heads", "channels"} or scores[name].shape != (sum(sizes),):
            got = {key: array.shape for key, array in scores.items()}
            raise ShapeError(f"scores: expected {name} of shape ({sum(sizes)},); got {got}")
        parts.append(np.split(scores[name].astype(np.float64), np.cumsum(sizes)[:-1]))
    return parts[0], parts[1]


def rank_units(scores: Tensors, layout: BlockLayout, settings: Settings) -> Ranking:
    """Return the ranking that scores give; ties go to the lower index, so it is the same on every machine."""
    heads, channels = split_by_block(scores, layout)
    units: list[tuple[float, int, tuple[int, ...]]] = []
    first: list[tuple[int, tuple[int, ...]]] = []
    for index, block in enumerate(layout.blocks):
        own = [(-worth, index, members) for worth, members in units_by_importance(heads[index], block, settings)]
        own.sort()
        # Every block's best unit comes before all others, so that no ratio empties a block.
        first.append(own[0][1:])
        units += own[1:]
    return Ranking(
        attention=(*first, *(unit[1:] for unit in sorted(units))),
        channels=tuple(tuple(np.lexsort((np.arange(part.size), -part)).tolist()) for part in channels),
    )


def units_by_importance(heads: Array, block: Block, settings: Settings) -> Sequence[tuple[float, tuple[int, ...]]]:
    """Return (worth, query heads) of a block's attention units."""
    groups = heads.reshape(block.kv_heads, block.group)
    if unit_of(settings, block) == "kv_group":
        members = np.arange(block.heads).reshape(block.kv_heads, block.group)
        return [(float(worth), tuple(row)) for worth, row in zip(groups.sum(axis=1), members.tolist(), strict=True)]
    # Slot j holds the j-th best head of every group: its worth falls with j, so what is kept is always a prefix.
    order = np.argsort(-groups, axis=1, kind="stable")  # (kv_heads, group)
    worth = np.take_along_axis(groups, order, axis=1).sum(axis=0)  # (group,)
    members = order + np.arange(block.kv_heads)[:, None] * block.group
    return [(float(worth[slot]), tuple(sorted(members[:, slot].tolist()))) for slot in range(block.group)]


def structure_at(ranking: Ranking, layout: BlockLayout, settings: Settings, ratio: float) -> ModelStructure:
    """Return what a ratio keeps: a larger ratio keeps a part of what a smaller one keeps."""
    count = counts(layout, settings, ratio)
    taken: list[list[int]] = [[] for _ in layout.blocks]
    if count.units is not None:
        left = list(count.units)
        for index, members in ranking.attention:
            if left[index] > 0:
                left[index] -= 1
                taken[index] += members
    else:
        for index, members in ranking.attention[: count.total]:
            taken[index] += members
    return ModelStructure(
        tuple(
            BlockStructure(
                q=tuple(sorted(heads)),
                kv=tuple(sorted({head // block.group for head in heads})),
                ff=tuple(sorted(order[:size])),
            )
            for block, heads, order, size in zip(layout.blocks, taken, ranking.channels, count.channels, strict=True)
        )
    )


def stage_ratios(ratio: float, stages: int) -> Sequence[float]:
    """Return the ratios of a round's stages: p (1 - (1 - s/S)^3), the last of them p.

    >>> stage_ratios(0.5, 1), stage_ratios(0.5, 2)
    ([0.5], [0.4375, 0.5])
    """
    return [ratio * (1 - (1 - stage / stages) ** 3) for stage in range(1, stages + 1)]


def to_base_coordinates(scores: Tensors, structure: ModelStructure | None, layout: BlockLayout) -> Tensors:
    """Return a pruned client's scores in the base's coordinates, NaN where it holds nothing.

    Raises:
        ShapeError: if they are not as long as what the client kept.
    """
    if structure is None:
        split_by_block(scores, layout)
        return {name: array.astype(np.float64) for name, array in scores.items()}
    spread = {}
    for name, sizes, parts in (
        ("heads", [block.heads for block in layout.blocks], [one.q for one in structure.blocks]),
        ("channels", [block.channels for block in layout.blocks], [one.ff for one in structure.blocks]),
    ):
        offsets = np.cumsum([0, *sizes[:-1]])
        places = np.concatenate([np.asarray(part, np.int64) + at for part, at in zip(parts, offsets, strict=True)])
        if scores.keys() != {"heads", "channels"} or scores[name].shape != places.shape:
            got = {key: array.shape for key, array in scores.items()}
            raise ShapeError(f"scores: expected {name} of shape {places.shape}, as kept; got {got}")
        # NaN and not 0: a client has no opinion of what it does not hold.
        spread[name] = np.full(sum(sizes), np.nan)
        spread[name][places] = scores[name]
    return spread


def at_structure(scores: Tensors, structure: ModelStructure | None, layout: BlockLayout) -> Tensors:
    """Return scores of the whole base at a structure: the inverse of `to_base_coordinates`."""
    if structure is None:
        return scores
    heads, channels = split_by_block(scores, layout)
    return {
        "heads": np.concatenate([part[list(one.q)] for part, one in zip(heads, structure.blocks, strict=True)]),
        "channels": np.concatenate([part[list(one.ff)] for part, one in zip(channels, structure.blocks, strict=True)]),
    }


def normalise(scores: Tensors, held: Tensors, layout: BlockLayout) -> Tensors:
    """Return scores in units of their mean over what `held` marks: heads over all blocks, channels block by block.

    Heads are never put on a scale of their own block: that would hide which blocks matter.
    """
    heads, channels = split_by_block(scores, layout)
    _, common = split_by_block({name: mask.astype(np.float64) for name, mask in held.items()}, layout)
    return {
        "heads": mean_normalised(np.concatenate(heads), held["heads"].astype(bool)),
        "channels": np.concatenate(
            [mean_normalised(part, at.astype(bool)) for part, at in zip(channels, common, strict=True)]
        ),
    }


def mean_normalised(values: Array, mask: Array) -> Array:
    """Return values in units of the mean of the marked ones, none above the number of the marked ones.

    No marked value can be larger than that. Without the bound, a client whose marked values are all close to zero would
    lift its others without limit.
    """
    return np.asarray(np.minimum(values / mean_of(values, mask), mask.sum() or mask.size))


def mean_of(values: Array, mask: Array) -> float:
    """Return the mean of the marked values; 1 where none is marked, or all of them are zero."""
    mean = float(np.mean(values[mask])) if mask.any() else 0.0
    return mean if mean > 0 and np.isfinite(mean) else 1.0


def pool_scores(parts: Sequence[tuple[Tensors, float]], before: Tensors, layout: BlockLayout) -> Tensors:
    """Return scores after a round: half of what they were, half of the clients' weighted mean.

    Args:
        parts: scores in the base's coordinates, NaN where a client holds nothing, with weights p_k.
        before: pooled scores so far; empty before the first time. What no client holds keeps its value.
        layout: of the base.
    """
    common = {name: np.all([np.isfinite(each[name]) for each, _ in parts], axis=0) for name in ("heads", "channels")}
    # Scaled over what all clients hold: else a client that lacks the weak groups would score the others lower.
    scaled = [(normalise(each, common, layout), weight) for each, weight in parts]
    bounds = {name: largest_worth([own[name] for own, _ in scaled]) for name in ("heads", "channels")}
    pooled = {}
    for name in ("heads", "channels"):
        total, weights = np.zeros(common[name].shape), np.zeros(common[name].shape)
        for own, weight in scaled:
            known = np.isfinite(own[name])
            total[known] += weight * np.minimum(own[name], bounds[name])[known]
            weights += weight * known
        mean = np.where(weights > 0, total / np.where(weights > 0, weights, 1.0), 0.0)
        old = before.get(name)
        new = mean if old is None else np.where(weights > 0, 0.5 * old + 0.5 * mean, old)
        pooled[name] = new.astype(np.float32)
    return pooled


def largest_worth(scores: Sequence[Array]) -> Array:
    """Return how much of one client's score counts, by unit: `LARGEST_WORTH` times the cohort's, or the mean unit's.

    Scores are in units of their mean, so one client could put all of them on a few units of its choice.
    """
    # Of two the smaller one. NaN, where a client has no opinion, is sorted behind all others.
    ordered = np.sort(np.stack(scores), axis=0)
    known = np.isfinite(ordered).sum(axis=0)
    middle = np.take_along_axis(ordered, np.maximum(0, (known - 1) // 2)[None], axis=0)[0]
    return np.asarray(LARGEST_WORTH * np.maximum(np.nan_to_num(middle, nan=1.0), 1.0))


def with_hysteresis(order: Tensors, scores: Tensors) -> Tensors:
    """Return the scores that rank: a group's follows the pooled one only when that has changed by more than `SWAP`."""
    if not order:
        return scores
    return {
        name: np.where(np.abs(scores[name] - old) > SWAP * np.abs(old), scores[name], old).astype(np.float32)
        for name, old in order.items()
    }


def votes(structure: ModelStructure, layout: BlockLayout) -> Tensors:
    """Return a client's mask as scores: 1 for what it keeps, 0 for the rest."""
    masks = {
        "heads": np.concatenate(
            [np.isin(np.arange(b.heads), k.q) for b, k in zip(layout.blocks, structure.blocks, strict=True)]
        ),
        "channels": np.concatenate(
            [np.isin(np.arange(b.channels), k.ff) for b, k in zip(layout.blocks, structure.blocks, strict=True)]
        ),
    }
    return {name: mask.astype(np.float32) for name, mask in masks.items()}
