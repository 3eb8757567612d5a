"""A client's training examples as bytes for another process on the same machine, and back without a copy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedtune.data.encode import Example


def encode(examples: Sequence[Example]) -> bytes:
    """Return the token ids and labels of examples; texts, which training does not read, stay behind.

    As 64-bit integers: whether labels are per token, the count, every length, every id, and every label.
    """
    causal = not any(isinstance(example.labels, int) for example in examples)
    lengths = [len(example.input_ids) for example in examples]
    labels = [np.atleast_1d(np.asarray(example.labels, np.int64)) for example in examples]
    head = np.array([causal, len(examples), *lengths], np.int64)
    return np.concatenate([head, *(example.input_ids for example in examples), *labels]).astype("<i8").tobytes()


def decode(data: bytes | memoryview) -> list[Example]:
    """Return the examples that `encode` was given, without their texts; the arrays are read-only views of `data`."""
    numbers = np.frombuffer(data, "<i8")
    causal, count = bool(numbers[0]), int(numbers[1])
    lengths, rest = numbers[2 : 2 + count], numbers[2 + count :]
    ends = np.cumsum(lengths)
    ids, labels = rest[: ends[-1] if count else 0], rest[ends[-1] if count else 0 :]
    return [
        Example(
            input_ids=ids[end - length : end],
            labels=labels[end - length : end] if causal else int(labels[row]),
            characters=0,
            prompt="",
            reference="",
            prompt_tokens=0,
        )
        for row, (length, end) in enumerate(zip(lengths.tolist(), ends.tolist(), strict=True))
    ]
