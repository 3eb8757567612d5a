from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from fedtune.messages import Client, Failure, Plan, PlannedClient, Training
from fedtune.planning.planner import ClientObservation
from fedtune.planning.two_adapters import TwoAdapters
from fedtune.pruning.ranking import PruningSettings, is_repair_round

TWO = PruningSettings(target=0.5, adapters="two")
PLAN = Plan("ann", 4, 1.0, Training(steps=2), ratio=0.0, ranks=(0, 4), back=0.5)


@dataclass
class Scripted:
    """A planner with one plan, which notes what it observes."""

    plans: Mapping[str, PlannedClient | Failure]
    seen: list[ClientObservation] = field(default_factory=list)

    def start(self) -> Any:
        return "nothing"

    def plan(self, learned: Any, round: int, cohort: Sequence[Client]) -> Mapping[str, PlannedClient | Failure]:
        return self.plans

    def observe(self, learned: Any, seen: Sequence[ClientObservation]) -> Any:
        self.seen += seen
        return learned


def test_every_second_round_is_of_the_repair_adapter_where_there_are_two() -> None:
    assert [is_repair_round(TWO, round) for round in range(1, 6)] == [False, True, False, True, False]
    assert not any(is_repair_round(settings, 2) for settings in (None, PruningSettings()))


def test_then_every_client_that_can_trains_it_in_the_deployed_structure() -> None:
    unfit = Failure("cyd", got="nothing fits", kind="unfit")
    small = PlannedClient(replace(PLAN, client="bob", ratio=0.75))
    planner = TwoAdapters(Scripted({"ann": PlannedClient(PLAN, top=0.5, why="alone"), "bob": small, "cyd": unfit}), TWO)
    assert planner.start() == "nothing"
    assert planner.plan("nothing", 1, ())["ann"] == PlannedClient(PLAN, top=0.5, why="alone")
    plans = planner.plan("nothing", 2, ())
    deployed = replace(PLAN, ratio=0.5, view="deployed", ranks=(), back=0.0)
    assert plans["ann"] == PlannedClient(deployed, top=1.0, why="alone; repairs what is deployed")
    assert plans["bob"] is small
    assert plans["cyd"] is unfit


@pytest.mark.parametrize("view", ["whole", "deployed"])
def test_a_planner_learns_the_times_of_both_and_the_gains_of_the_whole_model_alone(view: Any) -> None:
    inner = Scripted({})
    seen = ClientObservation(
        "ann", 3, 0.5, 4, compute_s=2.0, loss_before=3.0, loss_after=2.0, importance=1.0, view=view
    )
    assert TwoAdapters(inner, TWO).observe("x", [seen]) == "x"
    lost = {"loss_before": None, "loss_after": None, "importance": None}
    assert inner.seen == [seen if view == "whole" else replace(seen, **lost)]  # type: ignore[arg-type]
