from __future__ import annotations

from dataclasses import replace
from math import exp, isnan, log

import pytest

from fedtune.messages import Client, Failure, Plan, PlannedClient, Training
from fedtune.planning.adaptive import Adaptive, Learned, arm_of
from fedtune.planning.arms import AdaptiveSettings, Goal, Setting, sparing_arms
from fedtune.planning.floor import Floor
from fedtune.planning.planner import ClientObservation, Cost, Planner, Speed
from fedtune.planning.policies import policy_of
from fedtune.planning.policy import Arm
from fedtune.pruning.depth import module_ranks
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import Block, BlockLayout

TRAINING = Training(batch=4, learning_rate=0.1, epochs=1.0)
FLEET = [Client("ann", 8), Client("bob", 8), Client("cyd", 8)]


def cost(client: str, arm: Arm, training: Training) -> Cost:
    assert training.steps is not None
    return Cost(
        tflop=training.steps * (1 - arm.ratio), megabytes=arm.rank / 8, memory_gb=8 * (1 - arm.ratio) + arm.rank / 16
    )


LAYOUT = BlockLayout("llama", tuple(Block(f"layers.{i}", 1, 1, 1, 1) for i in range(5)), 1)
MODULES = tuple(f"layers.{i}.mlp.up_proj" for i in range(5))
PAIRS = AdaptiveSettings(
    ratios=(0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75), ranks=(2, 4, 8, 16, 32), tops=(1,), backs=(0,), shares=(1,)
)
"""Ratios and ranks alone."""


def planner(
    name: str = "deadline",
    *,
    memory: float = 16.0,
    target: float = 0.5,
    goal: Goal = "deployed",
    pruning: PruningSettings | None = None,
    ranking: bool = False,
    settings: AdaptiveSettings = PAIRS,
    **changes: object,
) -> Adaptive:
    policy = policy_of(replace(settings, name=name), Setting(rank=8, target=target, pruned=True))  # type: ignore[arg-type]
    ratios = sorted({arm.ratio for arm in policy.arms})
    planner = Adaptive(
        policy=policy,
        training=lambda client: TRAINING,
        costs=cost,
        traffic=lambda seen: (seen.bytes_down + seen.bytes_up) / 1e6,
        speeds={client.name: Speed(memory, 1.0, 1.0, 0.1) for client in FLEET},
        alpha="2r",
        rslora=False,
        seed=0,
        floor=Floor(goal, 10, ratios, pruning or PruningSettings(target=target), ranking),
        module_ranks=lambda rank, top: module_ranks(MODULES, LAYOUT, rank, top),
    )
    return replace(planner, **changes)  # type: ignore[arg-type]


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


def test_the_first_round_prunes_no_client_unless_an_order_is_known() -> None:
    assert {plan.ratio for plan in plans(planner("random"), 1).values()} == {0.0}
    drawn = {plan.ratio for seed in range(9) for plan in plans(planner("random", ranking=True, seed=seed), 1).values()}
    assert max(drawn) > 0
    local = PruningSettings(policy="local", target=0.5)
    drawn = {plan.ratio for seed in range(9) for plan in plans(planner("random", pruning=local, seed=seed), 1).values()}
    assert max(drawn) > 0


def test_the_last_rounds_train_what_is_deployed_and_the_others_are_free() -> None:
    deployed = planner("random")
    for round in (9, 10):
        assert {plan.ratio for plan in plans(deployed, round).values()} == {0.5}
    assert {plan.ratio for round in range(2, 9) for plan in plans(deployed, round).values()} > {0.0, 0.75}
    # Devices that hold the whole base train it to the end, those that do not in the structure that they deploy.
    speeds = {"ann": Speed(4.2), "bob": Speed(16.0), "cyd": Speed(16.0)}
    both = planner("random", goal="both", speeds=speeds)
    last = plans(both, 10)
    assert (last["ann"].ratio, last["bob"].ratio, last["cyd"].ratio) == (0.5, 0.0, 0.0)
    free = planner("random", target=0.0, goal="whole", speeds=speeds)
    ratios = {name: {plans(free, round)[name].ratio for round in range(2, 11)} for name in speeds}
    assert max(ratios["ann"]) > 0.5
    assert ratios["bob"] == ratios["cyd"] == {0.0}


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
    made = planner("random")
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


@pytest.mark.parametrize("name", ["bandit", "deadline", "s-ucb", "ucb", "thompson", "random"])
def test_learning_is_made_again_from_what_was_seen(name: str) -> None:
    made = planner(name)
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
    assert exp(learned["ann"].compute.mean) == pytest.approx(59.9 / 3)
    assert learned["ann"].compute.count == 0
    assert isnan(learned["bob"].compute.mean)
    # Her profile says 1 s each, and counts as half a measurement; the present is mostly what was measured.
    assert learned["cyd"].compute.mean == pytest.approx(log(2.0) / 1.49)
    assert learned["cyd"].transfer.mean == pytest.approx(log(2.0) / 1.49)  # by the bytes that were counted


def test_first_contact_is_in_the_least_pruned_model_that_fits() -> None:
    def first(memory: float) -> set[float]:
        made = planner("random", ranking=True, speeds={client.name: Speed(memory) for client in FLEET})
        found = made.plan(made.start(), 6, FLEET).values()
        return {planned.first_ratio for planned in found if isinstance(planned, PlannedClient)}

    assert first(16.0) == {0.0}
    assert first(5.0) == {0.5}  # 4.1 GB with the smallest rank; at .375 it is 5.1


WHOLE = AdaptiveSettings(ranks=(8,), tops=(1, 0.6, 0.4), backs=(0, 0.5), shares=(1, 0.5))


@pytest.mark.parametrize("name", ["bandit", "deadline", "s-ucb", "ucb", "thompson", "random"])
def test_every_part_of_an_arm_reaches_the_plan_and_comes_back(name: str) -> None:
    own = planner(name, goal="whole", settings=replace(WHOLE, down_ranks=(4, 16)))
    for round in range(1, 9):
        for planned in own.plan(own.start(), round, [Client(f"c{i}", 64) for i in range(6)]).values():
            assert isinstance(planned, PlannedClient)
            plan = planned.plan
            assert plan.training.steps == max(1, int(planned.share * 16 + 0.5))
            assert plan.ranks == module_ranks(MODULES, LAYOUT, 8, planned.top)
            seen = ClientObservation(
                plan.client,
                64,
                plan.ratio,
                plan.rank,
                top=planned.top,
                share=planned.share,
                back=plan.back,
                down_rank=planned.down_rank,
            )
            assert arm_of(seen) in own.policy.arms


def test_arms_that_ask_a_client_for_the_same_are_one() -> None:
    """Of one step half is one step, and of one block the top .4 and .6 are that block."""
    one = planner("random", goal="whole", settings=WHOLE, module_ranks=lambda rank, top: ())
    policy = one.policy
    shares = {arm.share for arm, fits in zip(policy.arms, feasible(one, 4), strict=True) if fits}
    assert shares == {1.0}
    assert sum(feasible(one, 4)) == 2  # back 0 and .5
    assert sum(feasible(planner("random", goal="whole", settings=WHOLE), 64)) == 12


def feasible(own: Adaptive, examples: int) -> tuple[bool, ...]:
    return own._options(own.start(), 2, Client("ann", examples)).feasible


def test_a_client_that_holds_the_whole_base_has_no_pruned_arm() -> None:
    own = planner("random", goal="both", settings=WHOLE, memory=16.0)
    arms = [arm for arm, fits in zip(own.policy.arms, feasible(own, 64), strict=True) if fits]
    assert {arm.ratio for arm in arms} == {0.0}
    small = planner("random", goal="both", settings=WHOLE, memory=5.0)
    arms = [arm for arm, fits in zip(small.policy.arms, feasible(small, 64), strict=True) if fits]
    assert {arm.ratio for arm in arms} == {0.5, 0.75}


def test_a_plan_depends_on_names_and_never_on_the_order_of_the_cohort() -> None:
    own = planner("bandit", goal="whole", settings=WHOLE)
    cohort = [Client(f"c{i}", 8 * (i + 1)) for i in range(7)]
    assert own.plan(own.start(), 3, cohort) == own.plan(own.start(), 3, cohort[::-1])


def test_without_pruning_a_device_that_is_too_small_is_advised_to_prune() -> None:
    own = planner(goal="whole", memory=1.0, settings=replace(WHOLE, ratios=(0.0,)))
    own = replace(own, floor=Floor("whole", 10, (0.0,)))
    failure = own.plan(own.start(), 2, FLEET)["ann"]
    assert isinstance(failure, Failure)
    assert "or write [pruning], by which a part of the base is enough" in failure.reason


def test_arms_that_save_memory_are_for_clients_that_hold_no_other() -> None:
    """As .5 GB of activations: with a part of the backward pass it fits, and the model need not be pruned."""

    def frugal(client: str, arm: Arm, training: Training) -> Cost:
        return Cost(1.0, 1.0, memory_gb=8 * (1 - arm.ratio) - arm.back)

    settings = AdaptiveSettings(ranks=(8,), tops=(1,), shares=(1,))
    for memory, expected in ((9.0, {(0.0, 0.0)}), (7.6, {(0.0, 0.5)}), (7.4, {(0.25, 0.0), (0.5, 0.0), (0.75, 0.0)})):
        own = planner("random", goal="whole", settings=settings, memory=memory, costs=frugal)
        own = replace(own, sparing=sparing_arms(settings, own.policy.arms))
        arms = [arm for arm, fits in zip(own.policy.arms, feasible(own, 64), strict=True) if fits]
        assert {(arm.ratio, arm.back) for arm in arms} == expected
    # A client that ran out of memory with all arms of one kind is left with the next, and never with none.
    for ran_out, expected in ((8.0, {(0.0, 0.5)}), (7.5, {(0.25, 0.0), (0.5, 0.0), (0.75, 0.0)})):
        own = planner("random", goal="whole", settings=settings, memory=9.0, costs=frugal)
        own = replace(own, sparing=sparing_arms(settings, own.policy.arms))
        options = own._options(Learned(own.policy.start(), {"ann": ran_out}), 2, FLEET[0])
        arms = [arm for arm, fits in zip(own.policy.arms, options.feasible, strict=True) if fits]
        assert {(arm.ratio, arm.back) for arm in arms} == expected
