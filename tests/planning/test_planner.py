from __future__ import annotations

from fedtune.messages import Training
from fedtune.planning.fixed import Fixed
from fedtune.planning.planner import Planner


def test_fixed_is_a_planner() -> None:
    planner: Planner = Fixed(lambda name: (1, Training(batch=1, learning_rate=0.1, steps=1)), "2r", False)
    assert planner.plan(None, 1, []) == {}
