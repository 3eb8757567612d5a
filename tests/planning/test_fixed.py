from __future__ import annotations

import pytest

from fedtune.messages import Client, Failure, PlannedClient, Training
from fedtune.planning.fixed import Fixed
from fedtune.planning.policy import Arm

TRAINING = Training(batch=4, learning_rate=0.1, steps=7)


def test_every_client_gets_its_rank_and_the_scale_of_the_alpha_policy() -> None:
    fixed = Fixed({"ann": (4, TRAINING), "bob": (16, TRAINING)}.__getitem__, "2r", False)
    plans = fixed.plan(None, 1, [Client("ann", 3), Client("bob", 3)])
    found = {name: each.plan for name, each in plans.items() if isinstance(each, PlannedClient)}
    asked = {name: (plan.rank, plan.scale) for name, plan in found.items()}
    assert asked == {"ann": (4, 2.0), "bob": (16, 2.0)}
    assert plans == fixed.plan(None, 9, [Client("ann", 3), Client("bob", 3)])


@pytest.mark.parametrize(("rslora", "scale"), [(False, 2.0), (True, 8.0)])
def test_a_given_alpha_is_divided_by_the_rank_or_its_root(rslora: bool, scale: float) -> None:
    plan = Fixed(lambda name: (16, TRAINING), 32.0, rslora).plan_for(Client("ann", 3))
    assert plan.scale == scale


def test_nobody_is_pruned_before_heads_can_be_told_apart() -> None:
    fixed = Fixed(lambda name: (4, TRAINING), "2r", False, ratio=lambda name: 0.5, ranking=False)
    planned = [fixed.plan(None, round, [Client("ann", 3)])["ann"] for round in (1, 2)]
    assert [each.plan.ratio for each in planned if isinstance(each, PlannedClient)] == [0.0, 0.5]


def test_a_device_is_held_against_what_its_plan_leaves_out() -> None:
    asked = Arm(0.0, 1, back=0.5, down_rank=2)

    def misfit(client: Client, arm: Arm, training: Training) -> str:
        return "" if arm == Arm(arm.ratio, 4, back=0.5, down_rank=2) else "needs 9 GB"

    fixed = Fixed(lambda name: (4, TRAINING), "2r", False, arm=lambda name: asked, misfit=misfit)
    planned = fixed.plan(None, 2, [Client("ann", 3)])["ann"]
    assert isinstance(planned, PlannedClient)
    assert (planned.plan.back, planned.down_rank) == (0.5, 2)


def test_whoever_cannot_hold_the_plan_sits_out_with_the_reason() -> None:
    def misfit(client: Client, arm: Arm, training: Training) -> str:
        return "needs 9 GB" if client.name == "bob" else ""

    plans = Fixed(lambda name: (4, TRAINING), "2r", False, misfit=misfit).plan(
        None, 1, [Client("ann", 3), Client("bob", 3)]
    )
    assert isinstance(plans["ann"], PlannedClient)
    assert plans["bob"] == Failure.from_text("bob", "needs 9 GB", kind="unfit")
