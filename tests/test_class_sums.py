from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.class_sums import LARGEST_FEATURE, ClassSums, Head, add, find_head, impossible, sum_features
from fedtune.errors import ShapeError

HEAD = Head("head.weight", "head.bias", 2, 2)
FEATURES = np.array([[1.0, -2.0], [0.5, 0.25], [3.0, 1.0]])
SUMS = sum_features(FEATURES, np.array([0, 1, 0]), 2, fraction_bits=2)
"""In quarters: [4, -8], [2, 1], [12, 4]."""


def test_sums_by_hand() -> None:
    assert SUMS.counts.tolist() == [2, 1]
    assert SUMS.sums.tolist() == [[16, -4], [2, 1]]
    assert SUMS.squares.tolist() == [16 + 4 + 144, 64 + 1 + 16]
    assert SUMS.examples == 3
    assert impossible(SUMS, HEAD, 3) == ("", "")


def test_features_are_rounded_to_even_and_cut() -> None:
    part = sum_features(np.array([[0.625, -1e9]]), np.array([1]), 2, fraction_bits=2)
    assert part.sums.tolist() == [[0, 0], [2, -LARGEST_FEATURE]]
    assert impossible(part, HEAD, 1) == ("", "")


@pytest.mark.guarantee("G4")
@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"counts": np.array([3, 1])}, "whose sum is 3"),
        ({"counts": np.array([4, -1])}, "whose sum is 3"),
        ({"counts": np.array([2, 1, 0])}, "counts of shape"),
        ({"sums": np.array([[16, -4, 0], [2, 1, 0]])}, "sums of shape"),
        ({"sums": np.array([[16, -4], [LARGEST_FEATURE + 1, 1]])}, "as the sum of feature 0 in class 1"),
        ({"sums": np.array([[16, -4], [-(2**63), 1]])}, "as the sum of feature 0 in class 1"),
        ({"counts": np.array([3, 0])}, "as the sum of feature 0 in class 1"),
        ({"squares": np.array([100, 81])}, "squares of feature 0 of at least 132, by its sums"),
        ({"squares": np.array([164, -1])}, "squares of feature 1 of at least"),
        ({"squares": np.array([164, 3 * LARGEST_FEATURE**2 + 2**30])}, "squares of feature 1 of at most"),
        ({"squares": np.array([164])}, "squares of shape"),
    ],
)
def test_sums_that_no_examples_have_are_named(changes: dict[str, Any], what: str) -> None:
    assert what in impossible(replace(SUMS, **changes), HEAD, 3)[0]


@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 2**32 - 1))
def test_sums_of_real_examples_are_possible_and_add_up_in_any_order(examples: int, classes: int, seed: int) -> None:
    rng = np.random.Generator(np.random.Philox(seed))
    scale = 10.0 ** rng.integers(-4, 5)
    rows = scale * rng.standard_normal((3, examples, 5))
    labels = rng.integers(classes, size=(3, examples))
    parts = [sum_features(x, y, classes, fraction_bits=11) for x, y in zip(rows, labels, strict=True)]
    head = Head("w", "b", classes, 5)
    assert [impossible(part, head, examples) for part in parts] == [("", "")] * 3
    whole = sum_features(rows.reshape(-1, 5), labels.ravel(), classes, fraction_bits=11)
    for ordered in (parts, parts[::-1]):
        total = add(ordered)
        assert same(total, whole)


def same(one: ClassSums, other: ClassSums) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("counts", "sums", "squares"))


@pytest.mark.parametrize(
    ("shapes", "what"),
    [
        ({"score.weight": (3, 8)}, "none; name it"),
        ({"score.weight": (2, 8)}, "an output layer with a bias.*score.weight alone"),
        ({"score.weight": (2, 8), "score.bias": (8,)}, "an output layer with a bias"),
        ({"a.weight": (2, 8), "b.weight": (2, 2)}, "a.weight, b.weight"),
        ({}, "for each of 2 classes"),
    ],
)
def test_a_base_without_such_a_head_is_refused(shapes: dict[str, tuple[int, ...]], what: str) -> None:
    with pytest.raises(ShapeError, match=what):
        find_head(shapes, 2)
