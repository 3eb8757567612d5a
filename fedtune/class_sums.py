"""Sums of a classifier's features by class, in whole numbers: what one client says, and what no honest one can say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.errors import ShapeError
from fedtune.tensors import Array

FRACTION_BITS = 11
"""A feature is rounded to a whole number of 2^-11: a hundredth of the spread that the features of encoders have."""
LARGEST_FEATURE = 2**19
"""In these units, to which larger features are cut: then the squares of `MOST_EXAMPLES` fit into 63 bits."""
MOST_EXAMPLES = 2**25 - 1
SLACK = 1e-9
"""Relative, for the rounding of a comparison in float64."""


@dataclass(frozen=True)
class ClassSums:
    """The result of a `SumClasses` task: what a head by discriminant analysis needs of a client's examples.

    C: classes, d: features, in units of 2^-fraction_bits
    """

    counts: Array
    """int64 (C,), examples of each class."""
    sums: Array
    """int64 (C, d), of their features."""
    squares: Array
    """int64 (d,), of the squares of the features of all examples."""
    base: str = ""
    """Digest of the base whose features they are."""

    @property
    def examples(self) -> int:
        return int(self.counts.sum())


@dataclass(frozen=True)
class Head:
    """Names of the last layer of a classifier, and its size."""

    weight: str
    bias: str
    classes: int
    features: int


def find_head(shapes: Mapping[str, Sequence[int]], classes: int) -> Head:
    """Return the layer with a row for each class among the parameters that are trained in full, by their shapes.

    >>> find_head({"score.weight": (2, 8), "score.bias": (2,), "dense.weight": (8, 8), "dense.bias": (8,)}, 2).weight
    'score.weight'

    Raises:
        ShapeError: if there is none, several, or one without a bias, which the head needs.
    """
    rows = sorted(name for name, shape in shapes.items() if len(shape) == 2 and shape[0] == classes)
    names = [name for name in rows if name.endswith(".weight")]
    if len(names) != 1:
        got = ", ".join(names) or "none"
        raise ShapeError(
            f"adapter.head: expected one layer with a row for each of {classes} classes among the modules trained in "
            f"full; got {got}; name it in adapter.modules_to_save, or set adapter.head to drawn"
        )
    bias = names[0].removesuffix("weight") + "bias"
    if tuple(shapes.get(bias, ())) != (classes,):
        raise ShapeError(
            f"adapter.head: expected an output layer with a bias, as text encoders have it; got {names[0]} alone; "
            "set adapter.head to drawn"
        )
    return Head(names[0], bias, classes, int(shapes[names[0]][1]))


def sum_features(features: Array, labels: Array, classes: int, *, fraction_bits: int) -> ClassSums:
    """Return the sums of finite features (n, d) of examples with these labels (n,), rounded to whole numbers first."""
    units = np.rint(np.asarray(features, np.float64) * 2.0**fraction_bits)
    whole = np.clip(units, -LARGEST_FEATURE, LARGEST_FEATURE).astype(np.int64)
    sums = np.zeros((classes, whole.shape[1]), np.int64)
    np.add.at(sums, labels, whole)
    return ClassSums(np.bincount(labels, minlength=classes).astype(np.int64), sums, np.square(whole).sum(0))


def add(parts: Sequence[ClassSums], *, base: str = "") -> ClassSums:
    """Return the sum of several; the order changes nothing."""
    return ClassSums(
        np.sum([part.counts for part in parts], axis=0),
        np.sum([part.sums for part in parts], axis=0),
        np.sum([part.squares for part in parts], axis=0),
        base,
    )


def impossible(part: ClassSums, head: Head, num_examples: int) -> tuple[str, str]:
    """Return (expected, got) of sums that no examples have; empty if some may have them.

    So a client counts as the examples that it has enrolled, whatever it sends, and none of its features is larger than
    `LARGEST_FEATURE`.
    """
    shapes = {"counts": (head.classes,), "sums": (head.classes, head.features), "squares": (head.features,)}
    for name, shape in shapes.items():
        if (own := getattr(part, name).shape) != shape:
            return f"{name} of shape {shape}", f"{own}"
    if (part.counts < 0).any() or (part.counts > num_examples).any() or part.examples != num_examples:
        return f"counts of at least 0 whose sum is {num_examples}, its examples", f"{part.counts[:8].tolist()}"
    # In float64, exact up to 2^53: no square of a number of 63 bits fits into 64.
    sums, counts = part.sums.astype(np.float64), part.counts.astype(np.float64)
    beyond = np.abs(sums) > counts[:, None] * LARGEST_FEATURE
    if beyond.any():
        row, column = (int(place) for place in np.argwhere(beyond)[0])
        most = int(part.counts[row]) * LARGEST_FEATURE
        return f"at most {most} as the sum of feature {column} in class {row}", f"{int(part.sums[row, column])}"
    # Cauchy and Schwarz: of n numbers with a sum s, the squares add up to s^2 / n at least.
    least = (np.square(sums) / np.maximum(counts, 1.0)[:, None]).sum(0)
    squares = part.squares.astype(np.float64)
    small = squares < least * (1 - SLACK)
    if small.any():
        column = int(np.flatnonzero(small)[0])
        return f"squares of feature {column} of at least {least[column]:.6g}, by its sums", f"{squares[column]:.6g}"
    large = squares > num_examples * float(LARGEST_FEATURE) ** 2
    if large.any():
        column = int(np.flatnonzero(large)[0])
        return f"squares of feature {column} of at most {num_examples} * 2^38", f"{squares[column]:.6g}"
    return "", ""


def root_mean_square(part: ClassSums, *, fraction_bits: int) -> Array:
    """Return the root mean square of each feature, float32 (d,)."""
    squares = part.squares.astype(np.float64) / max(1, part.examples)
    size: Array = (np.sqrt(squares) * 2.0**-fraction_bits).astype(np.float32)
    return size
