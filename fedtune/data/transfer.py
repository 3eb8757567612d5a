"""A client's training examples as bytes for another process on the same machine, and back without a copy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from fedtune.data.encode import Example

WITH_REJECTED = 2
"""First number of examples with rejected answers."""


def encode(examples: Sequence[Example]) -> bytes:
    """Return token ids, token types and labels of examples; texts, which training does not read, stay behind.

    As 64-bit integers: whether labels are per token, whether there are token types, the count, every length, every id,
    every type if there are any, and every label. Where there are rejected answers, `WITH_REJECTED` and a length come
    first; they follow behind so many numbers, as examples of their own.
    """
    if rejected := [example.rejected for example in examples if example.rejected is not None]:
        chosen = encode([replace(example, rejected=None) for example in examples])
        return np.array([WITH_REJECTED, len(chosen) // 8], "<i8").tobytes() + chosen + encode(rejected)
    typed = any(example.token_types is not None for example in examples)
    causal = not any(isinstance(example.labels, int) for example in examples)
    lengths = [len(example.input_ids) for example in examples]
    labels = [np.atleast_1d(np.asarray(example.labels, np.int64)) for example in examples]
    head = np.array([causal, typed, len(examples), *lengths], np.int64)
    ids = [example.input_ids for example in examples]
    types = [np.zeros_like(ex.input_ids) if ex.token_types is None else ex.token_types for ex in examples if typed]
    return np.concatenate([head, *ids, *types, *labels]).astype("<i8").tobytes()


def decode(data: bytes | memoryview) -> list[Example]:
    """Return the examples that `encode` was given, without their texts; the arrays are read-only views of `data`."""
    numbers = np.frombuffer(data, "<i8")
    if numbers[0] != WITH_REJECTED:
        return _decode(numbers)
    chosen, rejected = np.split(numbers[2:], [int(numbers[1])])
    pairs = zip(_decode(chosen), _decode(rejected), strict=True)
    return [replace(example, rejected=other) for example, other in pairs]


def _decode(numbers: NDArray[np.int64]) -> list[Example]:
    """Return the examples of one block of numbers."""
    causal, typed, count = bool(numbers[0]), bool(numbers[1]), int(numbers[2])
    lengths, rest = numbers[3 : 3 + count], numbers[3 + count :]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if count else 0
    ids, types, labels = np.split(rest, [total, total * (1 + typed)])
    return [
        Example(
            input_ids=ids[end - length : end],
            labels=labels[end - length : end] if causal else int(labels[row]),
            characters=0,
            prompt="",
            reference="",
            prompt_tokens=0,
            token_types=types[end - length : end] if typed else None,
        )
        for row, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True))
    ]
