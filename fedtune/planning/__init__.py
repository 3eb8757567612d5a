"""The planners by name: each chooses what every client of a round does."""

from __future__ import annotations

from collections.abc import Mapping

from fedtune.planning import expgrad, fedpipe, fixed, policies
from fedtune.planning.planner import PlannerType

PLANNERS: Mapping[str, PlannerType] = {
    "fixed": fixed.PLANNER,
    "fedpipe": fedpipe.PLANNER,
    "expgrad": expgrad.PLANNER,
    **{name: policies.planner_type(name) for name in policies.POLICIES},
}
