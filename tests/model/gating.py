"""A pruned model's double at the full model's cost: nothing is cut, and gates of 0 hide what pruning would remove."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedtune.model.importance import gates, readers
from fedtune.model.surgery import core
from fedtune.pruning.structure import BlockLayout, ModelStructure, check


@contextmanager
def with_gates(model: Any, keep: ModelStructure, anatomy: BlockLayout) -> Iterator[Any]:
    """Multiply by 0 what a structure leaves out, inside the block; the outputs are those of `with_structure`."""
    check(keep, anatomy)
    values = {}
    for names, sizes, parts in (
        (readers(anatomy, "q"), [block.heads for block in anatomy.blocks], [kept.q for kept in keep.blocks]),
        (readers(anatomy, "ff"), [block.channels for block in anatomy.blocks], [kept.ff for kept in keep.blocks]),
    ):
        for name, size, part in zip(names, sizes, parts, strict=True):
            value = torch.zeros(size)
            value[list(part)] = 1.0
            values[name] = value.to(core(model.get_submodule(name)).weight.device)
    with gates(model, values):
        yield model
