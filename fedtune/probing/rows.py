"""Batches of causal examples as numpy arrays: the same padding, and the same counts, as those of the torch client."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedtune.data.encode import IGNORED, Example


@dataclass(frozen=True, eq=False)
class PaddedRows:
    """Examples of a causal model, padded on the right to the longest."""

    input_ids: NDArray[np.int64]
    """(rows, time)"""
    attention_mask: NDArray[np.int64]
    """(rows, time), 1 where there is a token"""
    labels: NDArray[np.int64]
    """(rows, time), IGNORED where a token does not count; not shifted: the output at t predicts the label at t + 1."""
    count: int
    """Tokens that count in the loss."""
    tokens: int
    """Tokens of the examples, padding left out."""


def pad(examples: Sequence[Example], pad_id: int) -> PaddedRows:
    """Return examples of a causal model as a batch."""
    lengths = [len(example.input_ids) for example in examples]
    ids = np.full((len(examples), max(lengths)), pad_id, np.int64)
    mask, labels = np.zeros_like(ids), np.full_like(ids, IGNORED)
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        ids[row, :length], labels[row, :length], mask[row, :length] = example.input_ids, example.labels, 1
    # The first token of a row is predicted by nothing, so it never counts.
    return PaddedRows(ids, mask, labels, count=int((labels[:, 1:] != IGNORED).sum()), tokens=sum(lengths))
