"""The losses of a pruned client's change in the whole model: what a planner is paid for that cares about that one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtune.lora.adapter import Adapter, Factors
from fedtune.messages import Plan, TrainLora
from fedtune.model.base import Base
from fedtune.model.batches import Batch
from fedtune.model.lora import frozen_change, start, with_adapters
from fedtune.model.pruned_training import Structures, evaluation_loss, slices_of, with_received_adapters
from fedtune.pruning.structure import BlockLayout, scatter
from fedtune.tensors import Tensors


def loss_before_in_whole(base: Base, task: TrainLora, plan: Plan, rows: Sequence[Batch]) -> float:
    """Return the loss of what was sent, in the whole model."""
    with with_received_adapters(base, task, plan, base, {}) as model:
        return evaluation_loss(model, rows, base)


def loss_after_in_whole(
    base: Base,
    task: TrainLora,
    plan: Plan,
    rows: Sequence[Batch],
    *,
    initial: Adapter,
    final: Adapter,
    saved: Tensors,
    parts: Structures,
    layout: BlockLayout,
) -> float:
    """Return the loss of the whole model with the change that a client has made in its last structure.

    The server adds that change, and nothing else, to what was sent: final minus initial product, scattered.

    Args:
        base: whole.
        task: its blobs in the coordinates of the whole base.
        plan: rank and scale.
        rows: as before the training.
        initial: the trained adapter as it began, in the coordinates of the last structure.
        final: as it ended.
        saved: modules_to_save as they ended.
        parts: the client's structures.
        layout: of the base.
    """
    cut = slices_of(parts.last, layout)
    received = start(task, plan, base.modules)
    ended, began = (scatter(adapter, cut, base.modules) for adapter in (final, initial))
    local = {
        name: Factors(
            a=np.concatenate([factors.a, *(part[name].a for part in (ended, began) if name in part)]),
            b=np.concatenate(
                [factors.b, *(sign * part[name].b for part, sign in ((ended, 1), (began, -1)) if name in part)], axis=1
            ),
        )
        for name, factors in received.items()
    }
    with with_adapters(base, frozen=frozen_change(task), local=local, scale=plan.scale, saved=saved) as model:
        return evaluation_loss(model, rows, base)
