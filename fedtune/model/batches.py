"""Batches of examples as tensors, and how rows are padded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from fedtune.data.encode import IGNORED, Example
from fedtune.model.base import Base


@dataclass(frozen=True)
class Pairs:
    """What the loss of preferred and rejected answers needs beside both."""

    beta: float
    """See `Preference`."""
    margins: torch.Tensor
    """(pairs,), log p(preferred) - log p(rejected) by the reference, in float32."""


@dataclass(frozen=True)
class Batch:
    """Examples of equal padded length, as tensors on the base's device."""

    input_ids: torch.Tensor
    """(batch, time)"""
    attention_mask: torch.Tensor
    """(batch, time), 1 where there is a token"""
    labels: torch.Tensor
    """(batch, time) for causal models, (batch,) for classification"""
    count: int
    """Tokens (causal), examples (classification) or pairs of answers that count in the loss."""
    tokens: int
    """Tokens of the examples, padding left out."""
    token_types: torch.Tensor | None = None
    """(batch, time), the text of a pair that a token belongs to; None where all are of the first, or the model reads
    none."""
    fused: bool = False
    """Whether the loss is taken from hidden states, never holding all logits; see `Base.fused`."""

    positions: torch.Tensor | None = None
    """(batch, time), places within each example, where several share a row; None where each has its own."""
    pairs: Pairs | None = None
    """Where answers are compared: the first half of the rows are the preferred ones, the second half the others."""

    @property
    def inputs(self) -> Mapping[str, torch.Tensor]:
        """What the model reads, by the name of its argument."""
        if self.positions is not None:
            # Without a mask, transformers keeps attention between tokens whose positions follow each other.
            return {"input_ids": self.input_ids, "position_ids": self.positions}
        inputs = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        return inputs if self.token_types is None else {**inputs, "token_type_ids": self.token_types}


def collate(examples: Sequence[Example], base: Base, *, packed: bool = False) -> Batch:
    """Return examples as a batch, padded to the longest example, on the right unless the model needs it otherwise.

    Args:
        examples: of a client.
        base: that is to read them.
        packed: put short ones behind each other, in rows of the same length; see `pack`.
    """
    if rejected := [example.rejected for example in examples if example.rejected is not None]:
        preferred = [replace(example, rejected=None) for example in examples]
        margins = torch.tensor([example.margin for example in examples], dtype=torch.float32).to(base.device)
        batch = collate([*preferred, *rejected], base)
        return replace(batch, count=len(examples), pairs=Pairs(examples[0].beta, margins))
    if packed and not any(example.token_types is not None for example in examples):
        return pack(examples, base)
    side = padding_side(base)
    rows = [torch.tensor(example.input_ids, dtype=torch.int64) for example in examples]
    labels = [torch.tensor(example.labels, dtype=torch.int64) for example in examples]
    ids = pad_sequence(rows, batch_first=True, padding_value=base.pad_id, padding_side=side)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    causal = base.task == "causal"
    # IGNORED is what cross_entropy leaves out: no loss is taken on padding.
    targets = pad_sequence(labels, batch_first=True, padding_value=IGNORED) if causal else torch.stack(labels)
    # The first token of a row is predicted by nothing, so it never counts.
    count = int((targets[:, 1:] != IGNORED).sum()) if causal else len(examples)
    types = token_types(examples, base)
    ids, mask, targets = (tensor.to(base.device) for tensor in (ids, mask, targets))
    return Batch(ids, mask, targets, count=count, tokens=sum(map(len, rows)), token_types=types, fused=base.fused)


def pack(examples: Sequence[Example], base: Base) -> Batch:
    """Return examples of a causal model in rows as long as the longest, several in a row, none of which sees another.

    What counts in the loss is what counts without packing: the first token of an example is predicted by nothing.
    """
    rows = rows_of([len(example.input_ids) for example in examples])
    length = max(len(example.input_ids) for example in examples)
    ids = np.full((len(rows), length), base.pad_id, np.int64)
    # Padding is one more example of the row, of which nothing counts.
    labels, positions = np.full_like(ids, IGNORED), np.zeros_like(ids)
    for row, places in enumerate(rows):
        begin = 0
        for place in places:
            example = examples[place]
            end = begin + len(example.input_ids)
            ids[row, begin:end], labels[row, begin:end] = example.input_ids, example.labels
            labels[row, begin], positions[row, begin:end] = IGNORED, np.arange(end - begin)
            begin = end
        positions[row, begin:] = np.arange(length - begin)
    tensors = [torch.from_numpy(array).to(base.device) for array in (ids, labels, positions)]
    return Batch(
        input_ids=tensors[0],
        attention_mask=torch.ones_like(tensors[0]),
        labels=tensors[1],
        count=int((labels != IGNORED).sum()),
        tokens=sum(len(example.input_ids) for example in examples),
        fused=base.fused,
        positions=tensors[2],
    )


def rows_of(lengths: Sequence[int]) -> Sequence[Sequence[int]]:
    """Return which examples share a row of the longest one's length: the longer first, each into the first that fits.

    >>> rows_of([3, 9, 5, 1, 6])
    [[1], [4, 0], [2, 3]]
    """
    limit, rows, used = max(lengths, default=0), list[list[int]](), list[int]()
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        row = next((row for row, length in enumerate(used) if length + lengths[place] <= limit), len(rows))
        if row == len(rows):
            rows.append([])
            used.append(0)
        rows[row].append(place)
        used[row] += lengths[place]
    return rows


def token_types(examples: Sequence[Example], base: Base) -> torch.Tensor | None:
    """Return the token types of a padded batch, on the base's device; None where it needs none, or reads none."""
    if all(example.token_types is None for example in examples) or not reads(base.model, "token_type_ids"):
        return None
    # What is not given is of the first text, which is 0 for every tokenizer.
    given = (np.zeros_like(ex.input_ids) if ex.token_types is None else ex.token_types for ex in examples)
    rows = [torch.tensor(types, dtype=torch.int64) for types in given]
    padding = int(getattr(base.tokenizer, "pad_token_type_id", 0))
    side = padding_side(base)
    return pad_sequence(rows, batch_first=True, padding_value=padding, padding_side=side).to(base.device)


def padding_side(base: Base) -> str:
    """Return the side on which batches are padded: left for classifiers that read the last position, such as XLNet."""
    # Others find a text's end by its padding, or read the first position: on the right, positions stay as they are.
    reads_last = base.task == "classification" and hasattr(base.model, "sequence_summary")
    return "left" if reads_last and getattr(base.tokenizer, "padding_side", "right") == "left" else "right"


def reads(model: Any, argument: str) -> bool:
    """Return whether a model has an argument, such as token types: many tokenizers give them to models without it."""
    return argument in inspect.signature(model.forward).parameters
