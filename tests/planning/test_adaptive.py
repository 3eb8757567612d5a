from __future__ import annotations

from dataclasses import replace
from math import exp, isnan

import pytest

from fedtune.messages import Client, Failure, Plan, PlannedClient, Training
from fedtune.planning.adaptive import Adaptive, AdaptiveSettings
from fedtune.planning.planner import ClientObservation, Cost, Planner, Speed
from fedtune.planning.policies import policy_of
from fedtune.planning.policy import Arm
from fedtune.pruning.ranking import PruningSettings

TRAINING = Training(batch=4, learning_rate=0.1, epochs=1.0)
FLEET = [Client("ann", 8), Client("bob", 8), Client("cyd", 8)]


def cost(client: str, arm: Arm, training: Training) -> Cost:
    assert training.steps is not None
    return Cost(
        tflop=training.steps * (1 - arm.ratio), megabytes=arm.rank / 8, memory_gb=8 * (1 - arm.ratio) + arm.rank / 16
    )


def planner(name: str = "deadline", *, memory: float = 16.0, target: float = 0.5, **changes: object) -> Adaptive:
    made = Adaptive(
        policy=policy_of(AdaptiveSettings(name=name), pruned=True),  # type: ignore[arg-type]
        training=lambda client: TRAINING,
        costs=cost,
        traffic=lambda seen: (seen.bytes_down + seen.bytes_up) / 1e6,
        speeds={client.name: Speed(memory, 1.0, 1.0, 0.1) for client in FLEET},
        alpha="2r",
        rslora=False,
        seed=0,
        rounds=10,
        pruning=PruningSettings(target=target),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def plans(made: Adaptive, round: int, learned: object = None) -> dict[str, Plan]:
    found = made.plan(learned or made.start(), round, FLEET)  # type: ignore[arg-type]
    return {name: planned.plan for name, planned in found.items() if isinstance(planned, PlannedClient)}


def test_it_is_a_planner_and_epochs_become_steps() -> None:
    made: Planner = planner()
    found = made.plan(made.start(), 2, FLEET)["ann"]
    assert isinstance(found, PlannedClient)
    assert (found.plan.training.steps, found.plan.training.epochs, found.plan.scale) == (2, None, 2.0)
    assert found.why
    assert found.deadline_s is not None


def test_the_first_round_prunes_nobody_unless_an_order_is_known() -> None:
    assert {plan.ratio for plan in plans(planner(), 1).values()} == {0.0}
    known = plans(planner("random", ranking=True), 1).values()
    assert min(plan.ratio for plan in known) > 0  # the ramp has begun
    local = planner("random", pruning=PruningSettings(policy="local", target=0.5))
    assert min(plan.ratio for plan in plans(local, 1).values()) > 0


def test_the_ramp_rises_and_the_last_rounds_train_what_is_deployed() -> None:
    made = planner("random")
    least = [min(plan.ratio for plan in plans(made, round).values()) for round in range(2, 11)]
    ramp = PruningSettings(target=0.5)
    assert all(found >= min(0.5, ramp.ratio(round, 10)) for round, found in zip(range(2, 11), least, strict=True))
    for round in (8, 9, 10):
        assert {plan.ratio for plan in plans(made, round).values()} == {0.5}
    free = planner("random", target=0.0)
    assert {plan.ratio for round in range(2, 11) for plan in plans(free, round).values()} > {0.0, 0.75}


def test_voters_share_one_ratio() -> None:
    made = planner("random", pruning=PruningSettings(policy="vote", target=0.5))
    for round in range(1, 11):
        assert len({plan.ratio for plan in plans(made, round).values()}) == 1


def test_memory_is_a_constraint_before_anybody_fails() -> None:
    made = planner("random", memory=4.2)
    for round in range(2, 8):
        for plan in plans(made, round).values():
            assert 8 * (1 - plan.ratio) + plan.rank / 16 <= 4.2


def test_a_client_that_nothing_fits_is_told_the_smallest_need_and_what_it_has() -> None:
    made = planner(memory=1.0)
    found = made.plan(made.start(), 2, FLEET)["ann"]
    assert isinstance(found, Failure)
    assert found.kind == "unfit"
    assert "expected at least 2.12 GB of memory, for a ratio of 0.75 and rank 2; has 1 GB" in found.reason


def test_what_a_machine_says_of_its_memory_counts_where_no_profile_does() -> None:
    made = planner(speeds={})
    small = [Client("ann", 8, memory_bytes=5 * 10**9)]
    for round in range(2, 8):
        planned = made.plan(made.start(), round, small)["ann"]
        assert isinstance(planned, PlannedClient)
        plan = planned.plan
        assert 8 * (1 - plan.ratio) + plan.rank / 16 <= 0.85 * 5


def test_running_out_of_memory_bans_what_needs_as_much_for_that_client() -> None:
    made = planner("random", target=0.0)
    failed = ClientObservation("ann", 8, ratio=0.5, rank=16, status="failed", out_of_memory=True)
    learned = made.observe(made.start(), [failed])
    assert learned.too_large == {"ann": 5.0}
    for round in range(2, 30):
        found = plans(made, round, learned)
        assert 8 * (1 - found["ann"].ratio) + found["ann"].rank / 16 < 5.0
    others = {
        8 * (1 - plan.ratio) + plan.rank / 16
        for r in range(2, 30)
        for n, plan in plans(made, r, learned).items()
        if n != "ann"
    }
    assert max(others) > 5.0


def test_weights_are_those_of_the_clients_that_can_do_something() -> None:
    """So that a resumed round, which knows who was left out, plans the same."""
    made = planner(speeds={"ann": Speed(1.0), "bob": Speed(16.0, 1.0, 1.0), "cyd": Speed(16.0, 1.0, 1.0)})
    whole = made.plan(made.start(), 3, FLEET)
    part = made.plan(made.start(), 3, FLEET[1:])
    assert {name: whole[name] for name in part} == part


@pytest.mark.parametrize("name", ["deadline", "s-ucb", "ucb", "thompson", "random"])
def test_learning_is_made_again_from_what_was_seen(name: str) -> None:
    made = planner(name, target=0.0)
    learned, history = made.start(), []
    for round in range(1, 6):
        seen = [
            ClientObservation(
                n,
                8,
                p.ratio,
                p.rank,
                compute_s=2.0 - p.ratio,
                transfer_s=p.rank / 10,
                loss_before=2.0,
                loss_after=1.5 + p.ratio / 4,
                importance=1.0,
            )
            for n, p in plans(made, round, learned).items()
        ]
        learned = made.observe(learned, seen)
        history.append(seen)
    again = made.start()
    for seen in history:
        again = made.observe(again, seen)
    assert plans(made, 6, again) == plans(made, 6, learned)


def test_late_and_failed_clients_teach_what_is_known_of_them() -> None:
    made = planner()
    seen = [
        ClientObservation("ann", 8, 0.0, 8, status="late", compute_s=50.0, transfer_s=10.0, bytes_up=1_000_000),
        ClientObservation("bob", 8, 0.0, 8, status="failed"),
        ClientObservation("cyd", 8, 0.0, 8, compute_s=4.0, transfer_s=3.0, bytes_down=500_000, bytes_up=1_000_000),
        ClientObservation("eve", 8, 0.0, 0, status="unfit"),
    ]
    learned = made.observe(made.start(), seen).policy.clients
    assert learned.keys() == {"ann", "bob", "cyd"}
    # ann: 2 TFLOP and 1 MB were expected to take 3 s, and she was given up after 60, of which .1 are overhead.
    assert exp(learned["ann"].compute.log_s) == pytest.approx(59.9 / 3)
    assert learned["ann"].compute.count == 0
    assert isnan(learned["bob"].compute.log_s)
    assert exp(learned["cyd"].compute.log_s) == pytest.approx(2.0)
    assert exp(learned["cyd"].transfer.log_s) == pytest.approx(2.0)  # by the bytes that were counted


def test_first_contact_is_in_the_least_pruned_model_that_fits() -> None:
    def first(memory: float) -> set[float]:
        made = planner("random", ranking=True, speeds={client.name: Speed(memory) for client in FLEET})
        found = made.plan(made.start(), 6, FLEET).values()
        return {planned.first_ratio for planned in found if isinstance(planned, PlannedClient)}

    assert first(16.0) == {0.0}
    assert first(5.0) == {0.5}  # 4.1 GB with the smallest rank; at .375 it is 5.1
