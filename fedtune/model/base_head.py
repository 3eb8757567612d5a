"""A base with another classification head inside a `with` block: what seeds move then starts from that head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from fedtune.directions.seed_ledger import replace_tensors
from fedtune.errors import ShapeError
from fedtune.model.base import Base
from fedtune.tensors import Tensors


@contextmanager
def with_head(base: Base, head: Tensors) -> Iterator[Base]:
    """Give the base the tensors of a head inside the block, and yield it with the manifest of the whole.

    The base's own head is neither written nor moved: worker processes share its memory.

    Raises:
        ShapeError: if a tensor is none of those that this base trains in full, or has another shape there.
    """
    if not head:
        yield base
        return
    parameters = dict(base.model.named_parameters())
    for name, array in sorted(head.items()):
        own = tuple(parameters[name].shape) if name in base.saved else None
        if array.shape != own:
            expected = f"shape {own}" if own else f"one of those trained in full ({', '.join(base.saved)})"
            raise ShapeError(f"{name}: expected {expected}; got {array.shape if own else 'another'}")
    other = replace(base)
    # The manifest is kept with its base: to describe all of the model again would take seconds each round.
    vars(other)["manifest"] = replace_tensors(base.manifest, head)
    before = {name: parameters[name].data for name in head}
    try:
        for name, array in head.items():
            own_data = before[name]
            parameters[name].data = torch.tensor(array, dtype=own_data.dtype, device=own_data.device)
        yield other
    finally:
        for name, data in before.items():
            parameters[name].data = data
