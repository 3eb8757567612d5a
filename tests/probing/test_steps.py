"""Steps along seeds from losses, by hand."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

from fedtune.probing.steps import around, clip_scalar, steps_of
from tests.probing.conftest import probe


def test_plain_queries_are_measured_against_the_loss_at_the_weights() -> None:
    asked = probe(estimator="one-sided", queries=2)
    # lr (l_i - l_0) / (N eps) with eps = 1/32
    assert steps_of([2.0, 2.5, 1.75], asked, 0.1, deque()) == pytest.approx([0.1 * 0.5 * 16, -0.1 * 0.25 * 16])
    assert around([3, 5], asked) == [(3, 0), (3, -32), (5, -32)]


def test_normalised_queries_are_divided_by_their_own_spread_instead() -> None:
    asked = probe(estimator="one-sided", queries=4, normalise=True)
    sigma = math.sqrt((0.3**2 + 0.1**2 + 0.1**2 + 0.3**2) / 4)  # of 1.8, 2.0, 2.2, 2.4 about 2.1
    steps = steps_of([2.0, 1.8, 2.0, 2.2, 2.4], asked, 0.1, deque())
    assert steps == pytest.approx([0.1 * d / (4 * sigma) for d in (-0.2, 0.0, 0.2, 0.4)])
    assert steps_of([2.0, 2.0, 2.0, 2.0, 2.0], asked, 0.1, deque()) == [0.0] * 4  # no spread says nothing


def test_two_sides_per_seed_or_one_per_query_and_one_in_the_middle() -> None:
    assert around([7], probe()) == [(7, -32), (7, 32)]


@pytest.mark.parametrize(
    ("clip", "estimator", "losses", "steps"),
    [
        (0.5, "two-sided", [2.5, 2.0], [0.05]),
        (0.5, "two-sided", [2.0, 2.5], [-0.05]),
        (9.0, "two-sided", [2.5, 2.0], [0.8]),
        (math.inf, "two-sided", [1e30, 0.0], [1.6e30]),
        (0.5, "one-sided", [2.0, 2.5, 1.0], [0.025, -0.025]),
    ],
)
def test_a_clip_bounds_the_slope_before_it_is_multiplied(
    clip: float, estimator: Any, losses: Sequence[float], steps: Sequence[float]
) -> None:
    asked = probe(clip=clip, estimator=estimator, queries=2)
    assert steps_of(losses, asked, 0.1, deque()) == pytest.approx(steps)


def test_the_running_clip_holds_from_the_seventeenth_slope_on_and_forgets_the_oldest() -> None:
    sizes = deque[float](maxlen=128)
    assert [clip_scalar(g, 0.0, sizes) for g in [1.0, -100.0] + [1.0] * 14] == [1.0, -100.0] + [1.0] * 14
    # Of one 100 and fifteen ones the 0.9-quantile is 1: from here on the bound is 2.
    assert clip_scalar(-50.0, 0.0, sizes) == -2.0
    assert clip_scalar(1.5, 0.0, sizes) == 1.5
    assert list(sizes)[-2:] == [50.0, 1.5]  # as they were, not as they were clipped
    for _ in range(128):
        clip_scalar(10.0, 0.0, sizes)
    assert len(sizes) == 128
    assert clip_scalar(50.0, 0.0, sizes) == 20.0
