"""Sums of the features that a classifier's head reads, by class, over all examples of a client."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fedtune.class_sums import MOST_EXAMPLES, add, find_head, sum_features
from fedtune.data.encode import Example
from fedtune.errors import ClientError
from fedtune.messages import Assignment, ClientUpdate, Measured
from fedtune.model.base import Base
from fedtune.model.batches import collate
from fedtune.model.train import peak_bytes, report_out_of_memory
from fedtune.probing.scores import by_length
from fedtune.probing.steps import OnStep, no_steps


def sum_classes(
    base: Base, examples: Sequence[Example], assignment: Assignment, *, on_step: OnStep = no_steps
) -> ClientUpdate:
    """Return the sums of the base's features by class, in whole numbers: one forward pass over each example.

    Raises:
        ClientError: if the client holds no example, or more than can be summed up, or a feature is not finite.
        ShapeError: if the base has no head whose rows are the classes.
    """
    client, batch, bits = assignment.plan.client, assignment.plan.training.batch, assignment.sums.fraction_bits
    if not 1 <= len(examples) <= MOST_EXAMPLES:
        raise ClientError(f"{client}: expected 1 to {MOST_EXAMPLES} training examples; got {len(examples)}")
    began, tokens, parts = time.perf_counter(), 0, []
    parameters, classes = dict(base.model.named_parameters()), int(base.model.config.num_labels)
    head = find_head({name: tuple(parameters[name].shape) for name in base.saved}, classes)
    seen = list[torch.Tensor]()
    layer = base.model.get_submodule(head.weight.removesuffix(".weight"))
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batches = by_length(examples, batch)
    try:
        with report_out_of_memory(client, batch), torch.inference_mode():
            for done, places in enumerate(batches, 1):
                rows = collate([examples[place] for place in places], base)
                base.model(**rows.inputs)
                features = rows_of(seen.pop(), client)
                parts.append(sum_features(features, rows.labels.cpu().numpy(), classes, fraction_bits=bits))
                tokens += rows.tokens
                on_step(done, len(batches))
    finally:
        handle.remove()
    total = add(parts, base=base.digest)
    measured = Measured(seconds=time.perf_counter() - began, peak_bytes=peak_bytes(base.device), tokens=tokens)
    return ClientUpdate(client, assignment.round, len(examples), total, measured)


def rows_of(features: torch.Tensor, client: str) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return what the head read as (examples, features), float64.

    Raises:
        ClientError: if it reads each token, or a number is not finite.
    """
    if features.dim() != 2:
        raise ClientError(f"{client}: expected a head that reads a row for each example; got {tuple(features.shape)}")
    rows = features.detach().to("cpu", torch.float64).numpy()
    if not np.isfinite(rows).all():
        raise ClientError(f"{client}: expected finite features of the base; got others; check its weights and dtype")
    return rows
