"""A client's steps around training a pruned model: its structures, losses before and after, and scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedtune.data.encode import Example
from fedtune.messages import Plan, Pruning, TrainLora
from fedtune.model.base import Base
from fedtune.model.batches import Batch, collate
from fedtune.model.importance import scores
from fedtune.model.lora import frozen_change, start, with_adapters
from fedtune.model.loss import summed_loss
from fedtune.model.moments import Moments
from fedtune.model.objective import Between, Start
from fedtune.model.repair import Repair
from fedtune.model.surgery import layout_of, shrink_further, with_structure
from fedtune.pruning.ranking import (
    PruningSettings,
    at_structure,
    normalise,
    rank_units,
    stage_ratios,
    structure_at,
    to_base_coordinates,
)
from fedtune.pruning.structure import (
    BlockLayout,
    LayerSlice,
    ModelStructure,
    bitmap,
    cuts,
    from_bitmap,
    shapes,
    slice_flat,
    within,
)
from fedtune.seeds import derive, generator
from fedtune.tensors import Tensors

ROWS = 16
"""Examples on which the losses before and after are measured, the same for both; they cost two forward passes."""


def block_layout(base: Base) -> BlockLayout:
    """Return the blocks of a base, with the sizes that its costs depend on.

    Raises:
        ConfigError: for a model that cannot be pruned.
    """
    layout, model = layout_of(base.model), base.model
    parameters = dict(model.named_parameters())
    if base.task == "classification":
        head = sum(parameters[name].numel() for name in base.saved)
        outputs = int(model.config.num_labels)
    else:
        # Tied to the embeddings or not: the product with the output matrix is computed all the same.
        head, outputs = int(model.get_output_embeddings().weight.numel()), int(model.config.vocab_size)
    size = next(iter(parameters.values())).element_size()
    return replace(layout, head=head, outputs=outputs, number_bytes=size)


@dataclass(frozen=True)
class Structures:
    """The structures of one client in one round; None is the whole model."""

    stages: tuple[ModelStructure, ...]
    """Empty: the model stays whole."""
    before: ModelStructure | None
    """What the client trained in its last round."""
    sent: ModelStructure | None
    """The largest of them, in whose coordinates the blobs were sent."""

    def within(self, steps: int) -> Structures:
        """Return the last stages, as many as there are optimizer steps: every stage takes at least one."""
        return replace(self, stages=self.stages[-steps:])

    @property
    def first(self) -> ModelStructure | None:
        """The structure in which training starts."""
        return self.stages[0] if self.stages else None

    @property
    def last(self) -> ModelStructure | None:
        """The structure in which training ends."""
        return self.stages[-1] if self.stages else None


def structures_of(pruning: Pruning, layout: BlockLayout) -> Structures:
    """Return the structures that an assignment names.

    Raises:
        ShapeError: if a bitmap is not one of this base, or no structure holds all others.
    """
    stages = tuple(from_bitmap(bits, layout) for bits in pruning.stages)
    before = from_bitmap(pruning.previous, layout) if pruning.previous else None
    first = stages[0] if stages else None
    sent = None
    if first is not None and before is not None and not pruning.whole_requested:
        # Structures of one ranking contain each other, so the one with more units holds both.
        sent = max(first, before, key=lambda structure: sum(len(units.q) + len(units.ff) for units in structure.blocks))
    return Structures(stages=stages, before=before, sent=sent)


def own_structures(importance: Tensors, ratio: float, settings: PruningSettings, layout: BlockLayout) -> Structures:
    """Return the structures by a client's own scores; blobs are then in the coordinates of the whole base."""
    ranking = rank_units(importance, layout, settings)
    stages = (
        [structure_at(ranking, layout, settings, stage) for stage in stage_ratios(ratio, settings.stages)]
        if ratio > 0
        else []
    )
    # Two ratios may round to one structure, which needs no step of its own.
    return Structures(stages=tuple(dict.fromkeys(stages)), before=None, sent=None)


def slices_of(structure: ModelStructure | None, layout: BlockLayout) -> Mapping[str, LayerSlice]:
    """Return the slices of the base's layers that a structure keeps; none for the whole model."""
    return {} if structure is None else cuts(structure, layout)


def slice_task(
    task: TrainLora, structure: ModelStructure | None, sent: ModelStructure | None, layout: BlockLayout
) -> TrainLora:
    """Return a task with its blobs, sent in the coordinates of `sent`, sliced to one structure."""
    if structure is None:
        return task
    own = cuts(structure, layout)
    slices = own if sent is None else within(cuts(sent, layout), own)
    blobs = {
        role: slice_flat(blob, slices) if role in ("global", "local") else blob for role, blob in task.blobs.items()
    }
    return replace(task, blobs=blobs)


@contextmanager
def with_pruned_model(
    base: Base, structure: ModelStructure | None, layout: BlockLayout, repair: Repair | None = None
) -> Iterator[Base]:
    """Yield the base with its model pruned to a structure, and repaired, inside the block."""
    if structure is None:
        yield base
        return
    # A whole copy for clients of the whole model, beside which the pruned one would be a second.
    base.changed.clear()
    with with_structure(base.model, structure, layout, repair):
        yield replace(base, modules=shapes(base.modules, cuts(structure, layout)))


def evaluation_batches(rows: Sequence[Example], base: Base, *, batch: int) -> Sequence[Batch]:
    """Return the rows on which a round's losses are measured, in batches that training has memory for."""
    return [collate(rows[at : at + batch], base) for at in range(0, len(rows), batch)]


def evaluation_loss(model: torch.nn.Module, batches: Sequence[Batch], base: Base) -> float:
    """Return the mean loss over the evaluation rows, in nats per token (causal) or example."""
    losses = batch_losses(model, batches, base)
    return sum(losses) / max(1, sum(rows.count for rows in batches))


def finite_batches(model: torch.nn.Module, batches: Sequence[Batch], base: Base) -> Sequence[Batch]:
    """Return the batches of the evaluation rows whose loss is finite; all of them if none is."""
    # One text that overflows a 16-bit base must not cost a client its round: the rest says how well it learns.
    losses = zip(batches, batch_losses(model, batches, base), strict=True)
    return [rows for rows, loss in losses if math.isfinite(loss)] or batches


def batch_losses(model: torch.nn.Module, batches: Sequence[Batch], base: Base) -> Sequence[float]:
    """Return the summed loss of each batch."""
    with torch.inference_mode():
        return [float(summed_loss(model, rows, task=base.task)) for rows in batches]


@contextmanager
def with_received_adapters(
    base: Base, task: TrainLora, plan: Plan, whole: Base, slices: Mapping[str, LayerSlice]
) -> Iterator[torch.nn.Module]:
    """Attach the received adapters, not trained, to a base that may be pruned; `slices` are those of its structure."""
    with with_adapters(
        base,
        frozen=frozen_change(task),
        local=start(task, plan, whole.modules, slices),
        scale=plan.scale,
        saved=task.blobs.get("saved", {}),
    ) as model:
        yield model


def score_units(
    model: torch.nn.Module,
    base: Base,
    examples: Sequence[Example],
    settings: PruningSettings,
    layout: BlockLayout,
    structure: ModelStructure | None,
    *,
    key: int,
    batch: int,
    moments: Moments | None = None,
) -> tuple[Tensors, int]:
    """Return (scores of the heads and channels that the model has, tokens of the forward passes for them).

    The inputs of the same rows are added to the moments, if any are given.

    Scores are in units of their mean (heads over all blocks, channels by block), so that the server can pool those of
    clients with different data.
    """
    shuffled = generator(derive(key, "prune.scores")).permutation(len(examples)).tolist()
    rows = [shuffled[i : i + batch] for i in range(0, min(len(shuffled), settings.batches * batch), batch)]
    batches = [collate([examples[i] for i in part], base) for part in rows]
    raw = scores(
        model,
        batches,
        settings.score,
        layout,
        structure=structure,
        task=base.task,
        key=derive(key, "prune"),
        moments=moments,
    )
    wide = to_base_coordinates(raw, structure, layout)
    scaled = normalise(wide, {name: np.isfinite(part) for name, part in wide.items()}, layout)
    forward = settings.score not in ("magnitude", "random") or moments is not None
    return at_structure(scaled, structure, layout), sum(rows.tokens for rows in batches) if forward else 0


def wire_scores(importance: Tensors) -> Tensors:
    """Return scores as they travel, in float16."""
    # Clipped first: an infinite score would be refused by the server.
    largest = float(np.finfo(np.float16).max)
    return {name: np.clip(part, 0, largest).astype(np.float16) for name, part in importance.items()}


def vote(
    importance: Tensors, structure: ModelStructure | None, ratio: float, settings: PruningSettings, layout: BlockLayout
) -> bytes:
    """Return the mask that a client votes for: what its own scores keep at a ratio; units that it lacks go first."""
    wide = {
        # Below every score, and finite: units that the client lacks have none.
        name: np.where(np.isfinite(part), part, -1.0)
        for name, part in to_base_coordinates(importance, structure, layout).items()
    }
    return bitmap(structure_at(rank_units(wide, layout, settings), layout, settings, ratio), layout)


def stage_shrinker(
    model: torch.nn.Module,
    stages: Sequence[ModelStructure],
    settings: PruningSettings,
    layout: BlockLayout,
    *,
    steps: int,
    repair: Repair | None = None,
) -> Between | None:
    """Return the function that shrinks a model in training between its steps, stage after stage; None for one stage.

    In a short round stages are shorter than `steps_between`, so that it ends in the structure of the last stage.
    """
    if len(stages) < 2:
        return None
    # (steps - 1) intervals, so that the last stage begins before the last step.
    every = min(settings.steps_between, (steps - 1) // (len(stages) - 1))

    def between(steps: int, optimizer: torch.optim.Optimizer, start: Start) -> Sequence[torch.nn.Parameter] | None:
        stage, within_stage = divmod(steps, every)
        if within_stage or stage >= len(stages):
            return None
        return shrink_further(model, optimizer, stages[stage - 1], stages[stage], layout, start, repair)

    return between
