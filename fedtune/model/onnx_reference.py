"""What torch computes where a graph for devices is compared with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace

import numpy as np
import torch

from fedtune.directions.seed_ledger import SeedLedger
from fedtune.model.base import Base, to_numpy
from fedtune.model.batches import Batch
from fedtune.model.kron_forward import with_injected_paths
from fedtune.model.onnx_weights import round_to_8_bits
from fedtune.probing.rows import PaddedRows
from fedtune.probing.steps import Move


def losses_at(
    base: Base, ledger: SeedLedger, trainable: Sequence[int], rows: PaddedRows, moves: Sequence[Move]
) -> Sequence[float]:
    """Return the mean losses of a batch at the weights of a ledger, and around them."""
    ids, mask, labels = (torch.from_numpy(array) for array in (rows.input_ids, rows.attention_mask, rows.labels))
    with with_injected_paths(base, ledger, trainable) as position, torch.inference_mode():
        return position.losses(Batch(ids, mask, labels, rows.count, rows.tokens), moves)


def in_float32(base: Base, rounded: Mapping[str, int]) -> Base:
    """Return a base in float32, with the weights that codes in 8 bits are of in place of its own."""
    if not rounded and base.dtype == "float32":
        return base
    model = deepcopy(base.model).float()
    parameters = dict(model.named_parameters())
    for name, axis in rounded.items():
        codes, scale = round_to_8_bits(to_numpy(parameters[name]), axis=axis)
        whole = codes * (scale[:, None] if axis == 0 else scale)
        parameters[name].data = torch.from_numpy(whole.astype(np.float32))
    return replace(base, model=model, dtype="float32")
