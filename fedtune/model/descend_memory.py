"""Whether a client's work along seeds fits into the memory that is free, counted before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks

from fedtune.data.encode import IGNORED, Example
from fedtune.errors import ClientError
from fedtune.messages import OUT_OF_MEMORY, Training
from fedtune.model.base import Base
from fedtune.model.batches import Batch, collate
from fedtune.model.fused_loss import CHUNK_BYTES, GPU_FACTOR
from fedtune.model.loss import summed_loss
from fedtune.model.machine import available_bytes, resident_bytes
from fedtune.model.train import out_of_memory
from fedtune.probing.order import batches

HEAP: Mapping[str, float] = {"cpu": 1.5, "cuda": 1.0}
"""Memory that is taken for each byte of tensors that come and go; see `devices.memory.HEAP`."""
LENGTHS = (16, 48)
"""Tokens of the two texts whose stored bytes are counted."""
LOGIT_COPIES = 3
"""Of the logits that are there at a time, while the loss goes backward."""


def free_bytes(device: torch.device, limit: int | None = None) -> int:
    """Return the memory that this process could still take on a device, within a limit on what it takes in all."""
    if device.type != "cuda":
        free = available_bytes()
        return free if limit is None else min(free, max(0, limit - resident_bytes()))
    free, _ = torch.cuda.mem_get_info(device)
    # What torch's allocator has taken and nothing uses, it gives out again.
    return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))


def spare_bytes(device: torch.device, limit: int | None = None) -> int:
    """Return the memory that work may take for speed alone: half of the process's share of what is free.

    The other half is for activations. Processes that work side by side share the cores, and ask at the same time.
    """
    share = min(1.0, torch.get_num_threads() / count_cores()) if device.type == "cpu" else 1.0
    return int(min(free_bytes(device) * share, free_bytes(device, limit))) // 2


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_free(need: float, what: str, *, free: int, client: str) -> None:
    """Raise ClientError, in the words of memory that runs out, if more is needed than is free."""
    if need > free:
        raise too_large(client, f"{need / 1e9:.3g} GB for {what}, and {free / 1e9:.3g} GB are free")


@contextmanager
def report_out_of_memory(client: str) -> Iterator[None]:
    """Raise one kind of error where memory runs out, on every device.

    Raises:
        ClientError: in place of the device's own error.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise too_large(client, "more") from error


def too_large(client: str, got: str) -> ClientError:
    return ClientError(
        f"{client}: expected a step that fits into memory; got {got}: {OUT_OF_MEMORY}; lower descend.batch (and raise "
        'descend.accumulation), or set verb = "probe" or "auto"'
    )


def step_bytes(base: Base, examples: Sequence[Example], training: Training, *, key: int, gradients: float) -> float:
    """Return the bytes that the largest of a client's steps takes beside the weights.

    Args:
        base: at weights of which those that are trained require gradients.
        examples: the client's own.
        training: with `steps`.
        key: of the order of the data.
        gradients: bytes of the largest gradient.
    """
    sizes = step_sizes([len(example.input_ids) for example in examples], training, key=key)
    stored = stored_by_length(base, examples[0])
    most = max(rows * stored(length) for rows, length in sizes)
    tokens = max(rows * length for rows, length in sizes)
    vocabulary = base.model.get_input_embeddings().weight.shape[0] if base.task == "causal" else 0
    logits = 4.0 * tokens * vocabulary
    if base.fused:
        logits = min(logits, CHUNK_BYTES * (1 if base.device.type == "cpu" else GPU_FACTOR))
    # A tied tensor's gradient is a sum of two, and the second is there before they are added up.
    return HEAP.get(base.device.type, 1.0) * (most + LOGIT_COPIES * logits + 2 * gradients)


def step_sizes(lengths: Sequence[int], training: Training, *, key: int) -> Sequence[tuple[int, int]]:
    """Return (rows, padded length) of every batch of a client's steps."""
    assert training.steps is not None  # the planner resolves epochs
    order = batches(len(lengths), size=training.batch, key=key)
    chosen = [next(order) for _ in range(training.steps * training.accumulation)]
    return [(len(places), max(lengths[place] for place in places)) for places in chosen]


def stored_by_length(base: Base, example: Example) -> Callable[[int], float]:
    """Return what a row of a batch stores for the backward pass as a function of its length, in bytes.

    c t + d t^2 through two lengths that are counted: some attention stores a score for every pair of tokens.
    """
    lengths = [min(length, base.positions) for length in LENGTHS]
    counted = []
    for length in lengths:
        # One row is padded, or the mask that padding needs would not be counted.
        rows = [with_length(example, length), with_length(example, max(2, length // 2))]
        counted.append(stored_bytes(base, collate(rows, base)) / len(rows))
    if lengths[0] == lengths[1]:
        return lambda length: counted[0] / lengths[0] * length
    linear, square = np.linalg.solve([[length, length**2] for length in lengths], counted).tolist()
    return lambda length: max(0.0, linear) * length + max(0.0, square) * length**2


def with_length(example: Example, length: int) -> Example:
    """Return a text of so many tokens, those of an example over and over, all of which count in the loss."""
    ids = np.resize(example.input_ids, length)
    labels: Any = example.labels
    if not isinstance(labels, int):
        labels = np.where(np.arange(length) == 0, IGNORED, ids)
    return replace(example, input_ids=ids, labels=labels, token_types=None)


def stored_bytes(base: Base, batch: Batch) -> int:
    """Return the bytes that autograd stores of a batch's forward pass for the backward pass, without any weights."""
    own = chain(base.model.parameters(), base.model.buffers())
    weights = {tensor.untyped_storage().data_ptr() for tensor in own}
    stored = dict[int, int]()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        # Without its history: an output that its own step stores would keep itself, and the weights, alive for good.
        return tensor.detach()

    # Alive to the end: memory that is let go of would be counted again under the same address.
    with torch.enable_grad(), saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = summed_loss(base.model, batch, task=base.task)
    del loss
    return sum(stored.values())
