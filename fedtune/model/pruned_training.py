"""What a client with a pruned model does around its training: structures, losses on both sides of surgery, scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedtune.data.encode import Example
from fedtune.messages import Plan, Pruning, TrainLora
from fedtune.model.base import Base
from fedtune.model.importance import scores
from fedtune.model.lora import frozen, start, with_adapters
from fedtune.model.objective import Start
from fedtune.model.surgery import layout_of, shrink_further, with_structure
from fedtune.model.train import Batch, Between, collate, summed_loss
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
"""Examples on which the losses before and after are taken: two forward passes, the same rows for both."""


def block_layout(base: Base) -> BlockLayout:
    """Return the blocks of a base, with what its costs are made of.

    Raises:
        ConfigError: for a model that surgery does not know.
    """
    found, model = layout_of(base.model), base.model
    parameters = dict(model.named_parameters())
    if base.task == "classification":
        head = sum(parameters[name].numel() for name in base.saved)
        outputs = int(model.config.num_labels)
    else:
        head, outputs = int(model.get_output_embeddings().weight.numel()), int(model.config.vocab_size)
    size = next(iter(parameters.values())).element_size()
    return replace(found, head=head, outputs=outputs, number_bytes=size)


@dataclass(frozen=True)
class Structures:
    """The structures of one client in one round; None stands for the whole model."""

    stages: tuple[ModelStructure, ...]
    """Empty: the model stays whole."""
    before: ModelStructure | None
    sent: ModelStructure | None
    """In whose coordinates the blobs came: the largest of them all."""

    def within(self, steps: int) -> Structures:
        """Return the structures that so many optimizer steps have room for, at least one each: the last ones."""
        return replace(self, stages=self.stages[-steps:])

    @property
    def first(self) -> ModelStructure | None:
        return self.stages[0] if self.stages else None

    @property
    def last(self) -> ModelStructure | None:
        return self.stages[-1] if self.stages else None


def structures_of(pruning: Pruning, anatomy: BlockLayout) -> Structures:
    """Return the structures that an assignment names.

    Raises:
        ShapeError: if a bitmap is not one of this base, or no structure holds all others.
    """
    stages = tuple(from_bitmap(bits, anatomy) for bits in pruning.stages)
    before = from_bitmap(pruning.previous, anatomy) if pruning.previous else None
    first = stages[0] if stages else None
    sent = None
    if first is not None and before is not None:
        sent = max(first, before, key=lambda keep: sum(len(one.q) + len(one.ff) for one in keep.blocks))
    return Structures(stages=stages, before=before, sent=sent)


def own_structures(worth: Tensors, ratio: float, settings: PruningSettings, anatomy: BlockLayout) -> Structures:
    """Return the structures that a client's own scores give; what comes is in the coordinates of the whole base."""
    order = rank_units(worth, anatomy, settings)
    stages = (
        [structure_at(order, anatomy, settings, each) for each in stage_ratios(ratio, settings.stages)]
        if ratio > 0
        else []
    )
    return Structures(stages=tuple(dict.fromkeys(stages)), before=None, sent=None)


def cut_of(keep: ModelStructure | None, anatomy: BlockLayout) -> Mapping[str, LayerSlice]:
    return {} if keep is None else cuts(keep, anatomy)


def sliced_task(
    task: TrainLora, keep: ModelStructure | None, sent: ModelStructure | None, anatomy: BlockLayout
) -> TrainLora:
    """Return a task with its blobs cut to one structure."""
    if keep is None:
        return task
    cut = cut_of(keep, anatomy) if sent is None else within(cuts(sent, anatomy), cuts(keep, anatomy))
    blobs = {role: blob if role == "saved" else slice_flat(blob, cut) for role, blob in task.blobs.items()}
    return replace(task, blobs=blobs)


@contextmanager
def with_pruned_model(base: Base, keep: ModelStructure | None, anatomy: BlockLayout) -> Iterator[Base]:
    """Give the base with a pruned model for the length of the block."""
    if keep is None:
        yield base
        return
    with with_structure(base.model, keep, anatomy):
        yield replace(base, modules=shapes(base.modules, cuts(keep, anatomy)))


def evaluation_rows(examples: Sequence[Example], base: Base, *, key: int, batch: int) -> Sequence[Batch]:
    """Return the rows on which a round's losses are taken, in batches that training has room for."""
    order = generator(derive(key, "prune.rows")).permutation(len(examples))[:ROWS].tolist()
    return [collate([examples[i] for i in order[at : at + batch]], base) for at in range(0, len(order), batch)]


def evaluation_loss(model: torch.nn.Module, batches: Sequence[Batch], base: Base) -> float:
    """Return the mean loss of rows."""
    with torch.inference_mode():
        total = sum(float(summed_loss(model, each, task=base.task)) for each in batches)
    return total / max(1, sum(each.count for each in batches))


@contextmanager
def with_received_adapters(
    base: Base, task: TrainLora, plan: Plan, whole: Base, cut: Mapping[str, LayerSlice]
) -> Iterator[torch.nn.Module]:
    """Attach what was received, nothing of it trained, to a base that may be pruned."""
    with with_adapters(
        base,
        frozen=frozen(task),
        local=start(task, plan, whole.modules, cut),
        scale=plan.scale,
        saved=task.blobs.get("saved", {}),
    ) as model:
        yield model


def measured_scores(
    model: torch.nn.Module,
    base: Base,
    examples: Sequence[Example],
    settings: PruningSettings,
    anatomy: BlockLayout,
    keep: ModelStructure | None,
    *,
    key: int,
    batch: int,
) -> tuple[Tensors, int]:
    """Return (scores of what the model has, tokens that went forward for them), in units of their means."""
    order = generator(derive(key, "prune.scores")).permutation(len(examples)).tolist()
    rows = [order[i : i + batch] for i in range(0, min(len(order), settings.batches * batch), batch)]
    batches = [collate([examples[i] for i in part], base) for part in rows]
    found = scores(model, batches, settings.score, anatomy, structure=keep, task=base.task, key=derive(key, "prune"))
    wide = to_base_coordinates(found, keep, anatomy)
    scaled = normalise(wide, {name: np.isfinite(part) for name, part in wide.items()}, anatomy)
    forward = settings.score not in ("magnitude", "random")
    return at_structure(scaled, keep, anatomy), sum(each.tokens for each in batches) if forward else 0


def wire_scores(worth: Tensors) -> Tensors:
    """Return scores as they travel."""
    largest = float(np.finfo(np.float16).max)
    return {name: np.clip(part, 0, largest).astype(np.float16) for name, part in worth.items()}


def vote(
    worth: Tensors, keep: ModelStructure | None, ratio: float, settings: PruningSettings, anatomy: BlockLayout
) -> bytes:
    """Return the mask that a client votes for: what its own scores keep at a ratio; what it lacks goes first."""
    wide = {
        name: np.where(np.isfinite(part), part, -1.0)
        for name, part in to_base_coordinates(worth, keep, anatomy).items()
    }
    return bitmap(structure_at(rank_units(wide, anatomy, settings), anatomy, settings, ratio), anatomy)


def cutter(
    model: torch.nn.Module,
    stages: Sequence[ModelStructure],
    settings: PruningSettings,
    anatomy: BlockLayout,
    *,
    steps: int,
) -> Between | None:
    """Return what makes a model in training smaller between its steps, stage after stage.

    In a short round stages are shorter than `steps_between`: it must end in the structure of the last one.
    """
    if len(stages) < 2:
        return None
    every = min(settings.steps_between, (steps - 1) // (len(stages) - 1))

    def between(steps: int, optimizer: torch.optim.Optimizer, start: Start) -> Sequence[torch.nn.Parameter] | None:
        stage, odd = divmod(steps, every)
        if odd or stage >= len(stages):
            return None
        return shrink_further(model, optimizer, stages[stage - 1], stages[stage], anatomy, start)

    return between
