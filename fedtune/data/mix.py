"""How unlike the clients of a split are: rows of each label by client, and their distance from all rows together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fedtune.data.partition import Rows, sorted_values


@dataclass(frozen=True)
class Mix:
    """Rows of each label by client."""

    label: str
    """What the labels are: the column that the split divides by, or the class."""
    labels: Sequence[str]
    """In order, those with rows of any client."""
    counts: Mapping[str, Sequence[int]]
    """By client, its rows of each label, held-out ones included."""


def mix_of(label: str, values: Sequence[str], parts: Mapping[str, Rows]) -> Mix:
    """Return the rows of each label by client, given the label of each row."""
    counted = {name: Counter(values[row] for row in part.tolist()) for name, part in parts.items()}
    labels = sorted_values(value for own in counted.values() for value in own)
    return Mix(label, labels, {name: [own[value] for value in labels] for name, own in counted.items()})


def distances(mix: Mix) -> Mapping[str, float]:
    """Return each client's total-variation distance from the pool, all clients' rows together: from 0 to below 1.

    >>> distances(Mix("label", ["a", "b"], {"x": [2, 0], "y": [0, 2], "z": [1, 1]}))
    {'x': 0.5, 'y': 0.5, 'z': 0.0}
    """
    pooled = [sum(column) for column in zip(*mix.counts.values(), strict=True)]
    whole = sum(pooled)
    return {
        name: sum(abs(count / sum(own) - total / whole) for count, total in zip(own, pooled, strict=True)) / 2
        for name, own in mix.counts.items()
    }


def mean_distance(mix: Mix) -> float:
    """Return the mean of the clients' distances from the pool, each client counted once."""
    values = distances(mix).values()
    return sum(values) / len(values)
