from __future__ import annotations

from fedtune.planning import Planner
from fedtune.planning.fixed import Fixed


def test_fixed_is_a_planner() -> None:
    planner: Planner = Fixed({}, "2r", False, {})
    assert planner.plan(1, []) == {}
