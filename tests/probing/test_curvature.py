"""Slopes and curvatures along shared directions, of losses that are polynomials."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from fedtune.errors import ClientError
from fedtune.probing.curvature import Curvatures, measure_curvatures, shared_ids, slope_and_curvature
from fedtune.probing.rows import PaddedRows, pad
from fedtune.probing.steps import Move
from tests.probing.conftest import probe

UNIT = 2.0**-10


class Curve:
    """A loss along each seed; a move by -E is the step ahead."""

    def __init__(self, loss: Callable[[int, float], float]) -> None:
        self.loss = loss
        self.batches = list[PaddedRows]()

    def losses(self, batch: PaddedRows, moves: Sequence[Move]) -> Sequence[float]:
        self.batches.append(batch)
        return [self.loss(seed, -amount * UNIT) for seed, amount in moves]

    def move(self, seed: int, amount: int) -> None:
        raise AssertionError("nothing is moved")


def found(curve: Curve, rows: Any, **changes: Any) -> Curvatures:
    return measure_curvatures(
        curve, partial(pad, pad_id=0), rows, 2, probe(**changes), key=5, client="ann", rows=rows[:2]
    )


def test_slope_and_curvature_of_a_parabola_are_exact(examples: Any) -> None:
    curve = Curve(lambda seed, x: 3.0 + seed * x + 0.5 * (seed + 1) * x**2)
    result = found(curve, examples(5))
    ids = shared_ids(probe()).tolist()
    assert list(result.slopes) == pytest.approx(ids)
    assert list(result.curvatures) == pytest.approx([seed + 1 for seed in ids])
    assert (result.skipped, result.loss) == (0, 3.0)
    assert result.tokens == 3 * sum(batch.tokens for batch in curve.batches[:16])


def test_every_direction_has_a_batch_of_its_own_in_the_clients_order(examples: Any) -> None:
    curve = Curve(lambda seed, x: 1.0)
    found(curve, examples(8))
    read = [batch.input_ids.tobytes() for batch in curve.batches[:16]]
    assert len(set(read[:4])) == 4  # a pass over 8 examples by twos
    assert len(read) == 16


def test_directions_are_the_same_for_all_clients_and_differ_between_runs() -> None:
    ids = shared_ids(probe(seeds=4096))
    assert ids.tolist() == shared_ids(probe(seeds=4096, perturbation=7)).tolist()
    assert len(set(ids.tolist())) == 16
    assert ids.tolist() != shared_ids(probe(seeds=4096, key=1)).tolist()
    assert len(shared_ids(probe(seeds=4))) == 4


def test_losses_that_are_none_are_counted_and_leave_zeros(examples: Any) -> None:
    ids = shared_ids(probe()).tolist()
    broken = {ids[0]: math.nan, ids[1]: math.inf, ids[2]: 1e38}
    curve = Curve(lambda seed, x: broken.get(seed, 0.0) * (x > 0) if seed in broken and x > 0 else 1.0 + x)
    result = found(curve, examples(4))
    assert result.skipped == 3
    assert result.slopes[:3] == result.curvatures[:3] == (0.0, 0.0, 0.0)
    assert result.slopes[3] == pytest.approx(1.0)


def test_numbers_are_what_float32_holds(examples: Any) -> None:
    result = found(Curve(lambda seed, x: math.exp(x) + seed), examples(4))
    for number in (*result.slopes, *result.curvatures):
        assert float(np.float32(number)) == number


def test_a_client_without_examples_says_so() -> None:
    with pytest.raises(ClientError, match="ann: expected at least one training example"):
        found(Curve(lambda seed, x: 1.0), [])


def test_a_loss_that_is_none_has_neither() -> None:
    assert all(map(math.isnan, slope_and_curvature([1.0, math.inf, 1.0], 0.5)))
