from __future__ import annotations

from itertools import count

import pytest
import torch

from fedtune.client.speed import SIZE, seconds_per_tflop


def test_the_speed_is_that_of_the_products_that_were_done_in_time() -> None:
    """A clock that ticks a tenth of a second each time it is read: three products until the limit of a quarter."""
    ticks = count()
    found = seconds_per_tflop(torch.device("cpu"), limit_s=0.25, clock=lambda: 0.1 * next(ticks))
    assert found == pytest.approx(0.3 / (3 * 2 * SIZE**3 / 1e12))


def test_enough_work_ends_it_before_the_limit() -> None:
    """.05e12 operations are 187 products, whatever the clock shows."""
    reads: list[float] = []

    def clock() -> float:
        reads.append(0.0)
        return 1e-6 * len(reads)

    assert seconds_per_tflop(torch.device("cpu"), limit_s=1e9, clock=clock) > 0
    assert len(reads) == 1 + 187


def test_this_machine_computes_at_a_possible_speed() -> None:
    assert 1e-4 < seconds_per_tflop(torch.device("cpu"), limit_s=0.01) < 1e4
