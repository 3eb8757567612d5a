from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.data.mix import Mix, distances, mean_distance, mix_of


def test_rows_of_each_label_are_counted_by_client() -> None:
    mix = mix_of("label", ["10", "9", "9", "10", "2"], {"a": np.array([0, 1]), "b": np.array([2, 3])})
    assert mix == Mix("label", ["9", "10"], {"a": [1, 1], "b": [1, 1]})  # row 4 is no client's, so nor is its label


def test_the_mean_distance_by_hand() -> None:
    mix = Mix("label", ["a", "b"], {"x": [3, 1], "y": [1, 3]})
    assert distances(mix) == {"x": 0.25, "y": 0.25}
    assert mean_distance(mix) == 0.25
    assert mean_distance(Mix("label", ["a"], {"x": [3], "y": [9]})) == 0


@given(st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any), min_size=1, max_size=5))
def test_a_distance_is_between_nothing_and_one(counts: list[list[int]]) -> None:
    mix = Mix("label", ["a", "b", "c"], {str(place): own for place, own in enumerate(counts)})
    each = distances(mix)
    assert all(0 <= value < 1 for value in each.values())
    pooled = np.array(counts).sum(axis=0) / np.sum(counts)
    for own, value in zip(counts, each.values(), strict=True):
        assert value == pytest.approx(np.abs(np.array(own) / sum(own) - pooled).sum() / 2)
