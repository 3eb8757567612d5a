"""The pruning of clients: their tasks, the weights of their updates, and the ranking that their scores give.

FedSpine-style (after FedMP, FedPrLLM and HeteroFL), formulas ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from fedtune.errors import RoundError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.messages import AdmittedUpdate, PlannedClient, Pruning, Weighting
from fedtune.methods.method import Cohort
from fedtune.pruning.least_squares import pool_moments
from fedtune.pruning.ranking import (
    PruningSettings,
    is_repair_round,
    pool_scores,
    stage_ratios,
    to_base_coordinates,
    votes,
    with_hysteresis,
)
from fedtune.pruning.structure import BlockLayout, ModelStructure, Side, bitmap, from_bitmap, rows
from fedtune.tensors import Array, Tensors


class PrunedState(Protocol):
    """What is read here of a method's state."""

    @property
    def round(self) -> int: ...
    @property
    def anatomy(self) -> BlockLayout | None: ...
    @property
    def pruning(self) -> PruningSettings | None: ...
    @property
    def worth(self) -> Tensors: ...
    @property
    def order(self) -> Tensors: ...
    @property
    def scored(self) -> int: ...
    @property
    def moments(self) -> Tensors: ...
    @property
    def moments_on_the_wire(self) -> Tensors: ...
    @property
    def ratios(self) -> Mapping[str, float]: ...
    def structure(self, ratio: float) -> ModelStructure | None:
        """Return what the ranking keeps at a ratio; None: all of it."""
        ...


def pruning_task(state: PrunedState, planned: PlannedClient) -> tuple[Pruning | None, ModelStructure | None]:
    """Return one client's pruning task, and the structure that its blobs are cut to.

    The blobs cover all that the round needs: the first of the stages, and the structure of the last participation, in
    which the loss before is measured. Nested structures contain each other, so the larger one of the two is enough.

    Raises:
        RoundError: if a ratio is planned before heads and channels are ranked.
    """
    settings, layout, plan = state.pruning, state.anatomy, planned.plan
    if settings is None or layout is None:
        return None, None
    if settings.policy == "local":
        return Pruning(settings=replace(settings, ranking=None)), None
    if plan.ratio > 0 and not state.order:
        raise RoundError(
            f"round {state.round + 1}: expected an order of heads and channels before {plan.client} is pruned by "
            f"{plan.ratio:g}; got none; let a device that holds the whole model take part first, or name a file in "
            "pruning.ranking"
        )
    # A client that takes part for the first time has no earlier structure: the least that fits its device serves.
    first = planned.first_ratio if state.order else 0.0
    before, ratios = state.ratios.get(plan.client, first), stage_ratios(plan.ratio, settings.stages)
    if plan.view == "deployed":
        before = plan.ratio  # the repair adapter says something in that structure alone
    stages = [bitmap(structure, layout) for ratio in ratios if (structure := state.structure(ratio)) is not None]
    earlier = state.structure(before)
    due = 0 < settings.refresh <= state.round + 1 - state.scored
    # A new ranking ends the repair adapter: what this round teaches it would be lost, and no one measures moments.
    wanted = not state.order or (due and not is_repair_round(settings, state.round + 1))
    # In the whole model before and after are the same where neither structure is a smaller one.
    whole = planned.whole_requested and bool(stages or earlier is not None)
    task = Pruning(
        # A path on the server means nothing to clients.
        settings=replace(settings, ranking=None),
        # Two ratios may round to one structure, which needs no step of its own.
        stages=tuple(dict.fromkeys(stages)),
        previous=b"" if earlier is None else bitmap(earlier, layout),
        scores_requested=wanted,
        # In a pruned model the inputs of a layer are not those that it is repaired for.
        moments_requested=wanted and settings.repair != "none" and plan.ratio == 0,
        whole_requested=whole,
    )
    return task, None if whole else state.structure(min(before, ratios[0]))


def moments_sent(state: PrunedState, task: Pruning | None) -> Mapping[str, Tensors]:
    """Return the blob `moments` of a client whose task prunes its model; none for others, and where nothing is
    repaired.
    """
    if task is None or not state.moments or not (task.stages or task.previous):
        return {}
    # One mapping for all clients of a round, so that it is encoded once.
    return {"moments": state.moments_on_the_wire}


@dataclass(frozen=True)
class Scale:
    """By how much the change of one layer is multiplied, to be a mean over the clients that trained each part."""

    out: Array | None = None
    """By row; None: 1 for all."""
    into: Array | None = None
    """By column; None: 1 for all."""
    whole: float = 1.0
    """For the layer."""

    @property
    def changes(self) -> bool:
        return self.out is not None or self.into is not None or self.whole != 1.0


def coverage(
    cohort: Cohort, modules: Iterable[str], layout: BlockLayout | None, *, weights: Weighting, floor: float
) -> Mapping[str, Scale]:
    """Return 1 / max(c_g, floor) per layer and, of the pruned sides, per row or column, where a c_g is below 1.

    c_g is the share of the examples (or of the clients) whose update has the layer, and whose structure holds g: an
    integer ratio, so that it is exactly 1 where all clients train the same, and nothing is scaled.

    Args:
        cohort: the updates.
        modules: names of the layers.
        layout: of the base's blocks, where clients may be pruned.
        weights: what clients count by.
        floor: least share that is divided by.
    """
    sizes = [update.counts(weights) for update, _ in cohort]
    trained = [update.ranks for update, _ in cohort]
    holders = {name: tuple(name in ranks for ranks in trained) for name in modules}
    # Once for all layers that the same clients have trained: as a rule that is one set, or one for each depth.
    by_holders = {
        of: _by_side(cohort, [size * has for size, has in zip(sizes, of, strict=True)], layout, sum(sizes), floor)
        for of in set(holders.values())
    }
    scales = {}
    for name, of in holders.items():
        index, out, into = layout.sides.get(name, (-1, "all", "all")) if layout else (-1, "all", "all")
        if (out, into) == ("all", "all"):
            counted = sum(size * has for size, has in zip(sizes, of, strict=True))
            scales[name] = Scale(whole=_inverse(counted, sum(sizes), floor))
        else:
            assert layout is not None  # or there are no sides
            sides = by_holders[of]
            scales[name] = Scale(_along(out, index, sides, layout), _along(into, index, sides, layout))
    return {name: scale for name, scale in scales.items() if scale.changes}


def _inverse(count: int, total: int, floor: float) -> float:
    """Return 1 / max(count / total, floor); 1 where nothing or everything counts."""
    # As a fraction of integers, a share of 1 is exactly 1 and scales nothing.
    return 1.0 if count in (0, total) else 1.0 / max(float(Fraction(count, total)), floor)


def _by_side(
    cohort: Cohort, sizes: Sequence[int], layout: BlockLayout | None, total: int, floor: float
) -> Mapping[str, Array]:
    """Return the scale of each head or channel, `<block>.<side>`, for the sides where one is not 1.

    Args:
        cohort: the updates.
        sizes: what each of them counts; 0: it has not trained the layers that this is for.
        layout: of the base's blocks.
        total: what all clients count together.
        floor: least share that is divided by.
    """
    scales = {}
    for index, block in enumerate(layout.blocks if layout else ()):
        for side, size in (("q", block.heads), ("kv", block.kv_heads), ("ff", block.channels)):
            trainers = np.zeros(size, np.int64)  # examples (or clients) whose structure holds each head or channel
            for (update, _), weight in zip(cohort, sizes, strict=True):
                if update.structure is None:
                    trainers += weight
                else:
                    trainers[list(getattr(update.structure.blocks[index], side))] += weight
            trained = trainers > 0
            if (trainers[trained] < total).any():
                # As a fraction of integers, a share of 1 is exactly 1 and scales nothing.
                share = np.array([float(Fraction(int(count), total)) for count in trainers])
                # The floor bounds how far a few clients' change can grow: at 0.2, to five times itself.
                scales[f"{index}.{side}"] = np.where(trained, 1.0 / np.maximum(share, floor), 1.0)
    return scales


def scale_by_coverage(adapter: Adapter, scales: Mapping[str, Scale]) -> Adapter:
    """Return an adapter of the base with its layers, or rows or columns of them, scaled as `coverage` says."""
    scaled = dict(adapter)
    for name in adapter.keys() & scales.keys():
        scale, factors = scales[name], adapter[name]
        b = factors.b if scale.out is None else _product(factors.b, scale.out[:, None])
        a = factors.a if scale.into is None else _product(factors.a, scale.into)
        scaled[name] = Factors(a=a, b=b if scale.whole == 1.0 else _product(b, np.float64(scale.whole)))
    return scaled


def _product(factor: Array, by: Array | np.float64) -> Array:
    # In float64, rounded once.
    return (factor.astype(np.float64) * by).astype(np.float32)


def _along(side: Side, index: int, scale: Mapping[str, Array], layout: BlockLayout) -> Array | None:
    """Return a side's scale by row (or column); None where it is 1 throughout."""
    if side == "all" or index < 0:
        return None
    kind = "q" if side == "qkv" else side
    by = scale.get(f"{index}.{kind}")
    if by is None:
        return None
    if side == "ff":
        return by
    wide: Array = by[rows(range(len(by)), layout.blocks[index].head_dim) // layout.blocks[index].head_dim]
    return np.tile(wide, 3) if side == "qkv" else wide


def fields_after(state: PrunedState, cohort: Cohort) -> Mapping[str, Any]:
    """Return the fields of the state that change by the scores of a round."""
    settings, layout = state.pruning, state.anatomy
    if settings is None or layout is None:
        return {}
    # Kept for clients that were not in the cohort as well: they may come back many rounds later.
    ratios = {**state.ratios, **{update.client: update.ratio for update, _ in cohort}}
    parts = [
        (client_scores(update, layout), share) for update, share in cohort if update.lora.scores or update.lora.mask
    ]
    if settings.policy == "local" or not parts:
        return {"ratios": ratios}
    # Before the first scores, those of the ranking file that the recipe names.
    worth = pool_scores(parts, state.worth or state.order, layout)
    return {
        "ratios": ratios,
        "worth": worth,
        "order": with_hysteresis(state.order, worth),
        "scored": state.round + 1,
        **moments_after(state, cohort, settings, layout),
    }


def moments_after(
    state: PrunedState, cohort: Cohort, settings: PruningSettings, layout: BlockLayout
) -> Mapping[str, Tensors]:
    """Return the field `moments` after a round in which clients have measured them; nothing where none has."""
    parts = [(update.lora.moments, share) for update, share in cohort if update.lora.moments]
    return {"moments": pool_moments(parts, state.moments, settings, layout)} if parts else {}


def client_scores(update: AdmittedUpdate, layout: BlockLayout) -> Tensors:
    """Return a client's scores of heads and channels in the base's coordinates; a vote counts as scores of 0 and 1."""
    if update.lora.scores:
        return to_base_coordinates(update.lora.scores, update.structure, layout)
    return votes(from_bitmap(update.lora.mask, layout), layout)
