from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import ConfigError
from fedtune.messages import BaseDtype, Client, Failure, PlannedClient, Training
from fedtune.planning.allocation import gain
from fedtune.planning.deadline import LATE_SHARE
from fedtune.planning.fedpipe import BETTER, LARGEST_FACTOR, PLANNER, FedPipe, FedPipeMemory, FedPipeSettings, choices
from fedtune.planning.planner import ClientObservation, Cost, PlannerInputs, Speed
from fedtune.planning.policy import Arm
from tests.planning.test_allocation import LAYOUT, MODULES, TARGETS

TRAINING = Training(batch=4, steps=10)
WEIGHTS: Mapping[BaseDtype, float] = {"": 4.0, "int8": 2.5, "nf4": 1.5}
TOTAL = TARGETS.numbers(3)  # 68


def costs(client: str, arm: Arm, training: Training, base_dtype: BaseDtype = "") -> Cost:
    """4 GB of weights, a tenth of a GB for each example and block; 2 TFLOP, and as many again for backward passes."""
    depth = round(3 * arm.top)
    numbers, passes = arm.rank * TARGETS.numbers(depth), training.batch * training.accumulation * (training.steps or 0)
    activations = 0.1 * training.batch * depth
    return Cost(
        tflop=passes / 40 * (2 + 2 * depth / 3) * (1 + numbers / 1000),
        megabytes=1 + numbers / 100,
        memory_gb=WEIGHTS[base_dtype] + activations + numbers / 1000,
        memory_parts={"weights": WEIGHTS[base_dtype], "activations": activations, "adapters": numbers / 1000},
    )


def planner(speeds: Mapping[str, Speed] | None = None, *, rank: int = 2, **changes: Any) -> FedPipe:
    inputs = PlannerInputs(
        seed=0,
        rounds=20,
        training=lambda client: (rank, TRAINING),
        base="tiny",
        module_shapes=MODULES,
        layout=LAYOUT,
        costs_by_format=costs,
        kind=lambda client: "all",
        speeds=speeds or {},
        memory_gb=lambda client: client.memory_bytes / 1e9 or None,
    )
    made = PLANNER.create(FedPipeSettings(**changes), inputs)
    assert isinstance(made, FedPipe)
    return made


def planned(
    own: FedPipe, clients: Sequence[Client], round: int = 1, learned: FedPipeMemory | None = None
) -> Mapping[str, PlannedClient]:
    plans = own.plan(learned or own.start(), round, clients)
    assert not [plan for plan in plans.values() if isinstance(plan, Failure)]
    return {name: plan for name, plan in plans.items() if isinstance(plan, PlannedClient)}


def ranks_of(own: PlannedClient) -> Sequence[int]:
    return own.plan.ranks or (own.plan.rank,) * len(MODULES)


def observed(own: PlannedClient, **changes: Any) -> ClientObservation:
    """The observation of a client that did what it was asked."""
    plan = own.plan
    seen = ClientObservation(
        client=plan.client,
        num_examples=10,
        ratio=0.0,
        rank=plan.rank,
        steps=plan.training.steps,
        ranks=plan.ranks,
        base_dtype=plan.base_dtype,
        batch=own.batch,
    )
    return replace(seen, **changes)


def fast(s_per_tflop: float, s_per_mb: float = 0.0, memory_gb: float = 100.0) -> Speed:
    return Speed(memory_gb, s_per_tflop, s_per_mb)


def test_without_limits_all_train_what_the_recipe_says() -> None:
    """The order is that of the planner `fixed`: one rank for all says nothing by module."""
    own = planned(planner(), [Client("a", 10), Client("b", 30)])
    assert {plan.plan.rank for plan in own.values()} == {2}
    assert {plan.plan.ranks for plan in own.values()} == {()}
    assert own["a"].plan.training == TRAINING
    assert (own["a"].deadline_s, own["a"].batch, own["a"].share, own["a"].plan.base_dtype) == (None, None, 1.0, "")


def test_less_memory_takes_smaller_batches_before_depth() -> None:
    """Whole: 4 + 4 * .3 + .136 GB. With 4.9 GB a batch of 2 still fits in all three blocks: 4 + .6 + .136."""
    own = planned(planner(), [Client("a", 10, int(4.9e9))])["a"]
    assert (own.plan.training.batch, own.plan.training.accumulation, own.batch) == (2, 2, 2)
    assert (own.plan.rank, own.plan.ranks) == (2, ())
    # 4.36 GB: a batch of one in three blocks is 4.3 GB, and leaves 60 numbers: not one for each.
    cut = planned(planner(), [Client("a", 10, int(4.36e9))])["a"]
    assert cut.plan.training.batch == 1
    assert TARGETS.depth(ranks_of(cut)) == 2
    assert TARGETS.cost(ranks_of(cut)) <= 1000 * (4.36 - 4.2)


def test_a_base_format_is_taken_only_where_the_recipe_s_own_does_not_fit() -> None:
    own = planner(base_dtypes=("int8", "nf4"))
    formats = {gb: planned(own, [Client("a", 10, int(gb * 1e9))])["a"].plan.base_dtype for gb in (6, 3.9, 2.4)}
    assert formats == {6: "", 3.9: "int8", 2.4: "nf4"}


def test_what_nothing_fits_sits_out_with_its_smallest_need_by_part() -> None:
    plans = planner(base_dtypes=("int8",)).plan(FedPipeMemory(), 1, [Client("a", 10, int(2e9)), Client("b", 10)])
    assert isinstance(plans["b"], PlannedClient)
    why = plans["a"]
    assert isinstance(why, Failure)
    assert why.kind == "unfit"
    assert why.reason == (
        "expected at least 2.63 GB of memory (weights 2.5, activations 0.1, adapters 0.028), for rank 1 in 1 of 3 "
        "blocks; has 2 GB; lower data.max_tokens, or set client.gradient_checkpointing = true"
    )


def test_a_slow_site_trains_less_so_that_the_round_ends() -> None:
    """Ten times as slow: it is not waited for ten times as long."""
    speeds = {**{f"fast-{i}": fast(1.0) for i in range(3)}, "slow": fast(10.0)}
    own = planned(planner(speeds), [Client(name, 10) for name in speeds])
    assert own["fast-0"].plan.rank == 2
    seconds = {name: 10 * (1.0 if name != "slow" else 10.0) for name in speeds}
    slow = own["slow"].plan
    assert TARGETS.depth(ranks_of(own["slow"])) < 3 or (slow.training.steps or 0) < 10
    assert own["slow"].deadline_s is not None
    assert own["slow"].deadline_s < LATE_SHARE * seconds["slow"] * 4


def test_a_deadline_is_met_where_it_can_be() -> None:
    speeds = {"fast": fast(1.0), "slow": fast(2.0)}
    # Rank 2 in three blocks and ten steps: 4 TFLOP * 1.136. With 4 s the fast one must leave something out.
    for end in (3.0, 4.0, 5.0, 9.0):
        own = planned(planner(speeds, deadline_s=end, least_share=0.2), [Client(name, 10) for name in speeds])
        for name, plan in own.items():
            arm = Arm(0.0, 1, top=TARGETS.depth(ranks_of(plan)) / 3)
            one, two = (costs(name, replace(arm, rank=rank), plan.plan.training).tflop for rank in (1, 2))
            slope = (two - one) / TARGETS.numbers(round(3 * arm.top))
            tflop = one + slope * (TARGETS.cost(ranks_of(plan)) - TARGETS.numbers(round(3 * arm.top)))
            assert tflop * (speeds[name].s_per_tflop or 0) <= end * (1 + 1e-9)
            assert plan.deadline_s == pytest.approx(LATE_SHARE * end)
    assert own["fast"].plan.rank == 2


def test_one_that_is_always_late_takes_its_fastest_option() -> None:
    own = planned(planner({"a": fast(1000.0)}, deadline_s=1.0), [Client("a", 10)])["a"]
    assert TARGETS.depth(ranks_of(own)) == 1
    assert (own.plan.rank, own.plan.training.steps, own.share) == (1, 5, 0.5)
    assert own.deadline_s is not None
    assert own.deadline_s > 1000


IMPORTANCE = {name: 0.02 for name in MODULES} | {"layers.1.up": 0.88}
SHARES = tuple(IMPORTANCE[name] for name in sorted(MODULES))


def warmed(own: FedPipe, clients: Sequence[Client], **changes: Any) -> FedPipeMemory:
    """Return what is known after the warm-up, in which every client measures `IMPORTANCE`."""
    learned = own.start()
    for round in (1, 2):
        plans = planned(own, clients, round, learned)
        learned = own.observe(learned, [observed(plan, module_importance=SHARES, **changes) for plan in plans.values()])
    return learned


def test_the_warm_up_trains_rank_one_everywhere_and_measures() -> None:
    own = planner(importance="gain")
    first = planned(own, [Client("a", 10)])["a"].plan
    assert (first.rank, first.ranks, first.importance) == (1, (), "gain")
    learned = warmed(own, [Client("a", 10)])
    assert learned.importance == pytest.approx(IMPORTANCE)
    third = planned(own, [Client("a", 10)], 3, learned)["a"]
    ranks = dict(zip(sorted(MODULES), third.plan.ranks, strict=True))
    # 136 numbers, 68 of them of rank 1 everywhere: what is left goes to the one that matters.
    assert min(ranks.values()) == 1
    assert ranks["layers.1.up"] == max(ranks.values()) == third.plan.rank == 4
    assert TARGETS.cost(third.plan.ranks) <= 2 * TOTAL
    assert third.plan.importance == ""


def test_importance_is_measured_again_before_plans_are_weighed() -> None:
    own = planner(importance="svd", replan_every=3)
    assert [own._score_request(round) for round in range(1, 9)] == ["svd", "svd", "", "", "svd", "", "", "svd"]
    assert {planner(importance=name)._score_request(1) for name in ("uniform", "random")} == {""}


def test_a_plan_stays_until_another_is_worth_more() -> None:
    own, clients = planner(importance="gain", replan_every=3), [Client("a", 10)]
    learned = warmed(own, clients)
    plan = planned(own, clients, 3, learned)["a"]
    other = {**dict.fromkeys(MODULES, 0.02), "layers.2.up": 0.88}
    changed = tuple(other[name] for name in sorted(MODULES))
    for round in (3, 4, 5):
        assert planned(own, clients, round, learned)["a"].plan.ranks == plan.plan.ranks
        learned = own.observe(learned, [observed(plan, module_importance=changed)])
    moved = planned(own, clients, 6, learned)["a"].plan
    assert moved.ranks != plan.plan.ranks
    assert dict(zip(sorted(MODULES), moved.ranks, strict=True))["layers.2.up"] > 1
    # A little more elsewhere is no reason to build another model.
    slightly = replace(learned, importance={**IMPORTANCE, "layers.1.up": 0.87, "layers.0.q": 0.03})
    assert BETTER > 1
    assert planned(own, clients, 6, slightly)["a"].plan.ranks == plan.plan.ranks


def test_a_plan_that_ran_out_of_memory_is_out_for_good_with_all_that_need_as_much() -> None:
    own, clients = planner(), [Client("a", 10, int(8e9)), Client("b", 10, int(8e9))]
    plans = planned(own, clients)
    learned = own.observe(
        own.start(), [observed(plans["a"], status="failed", out_of_memory=True), observed(plans["b"])]
    )
    assert learned.too_large == {"a": pytest.approx(4 + 1.2 + 0.136)}
    after = planned(own, clients, 2, learned)
    assert after["a"].plan.training.batch == 2
    assert after["b"].plan.training.batch == 4
    worse = own.observe(learned, [observed(after["a"], status="failed", out_of_memory=True)])
    assert worse.too_large["a"] == pytest.approx(4 + 0.6 + 0.136)
    assert planned(own, clients, 3, worse)["a"].plan.training.batch == 1


def test_a_device_that_needs_more_than_predicted_gets_plans_that_need_less() -> None:
    """Predicted 5.336 GB, measured 1.25 times as much: a plan for 6.67 GB is now one for 5.336."""
    own, clients = planner(), [Client("a", 10, int(6e9))]
    plan = planned(own, clients)["a"]
    assert plan.plan.training.batch == 4
    learned = own.observe(own.start(), [observed(plan, peak_bytes=int(1.25 * 5.336e9))])
    assert learned.factor == {"a": pytest.approx(1.25)}
    assert planned(own, clients, 2, learned)["a"].plan.training.batch == 2
    # Ten terabytes are a claim: it counts as no more than a bound, and harms the client alone.
    liar = own.observe(own.start(), [observed(plan, peak_bytes=int(1e13))])
    assert liar.factor == {"a": LARGEST_FACTOR}
    # The peak of this machine says nothing of a device that is simulated.
    simulated = planner({"a": fast(1.0)})
    assert simulated.observe(simulated.start(), [observed(plan, peak_bytes=int(1e13))]).factor == {}


def test_a_round_teaches_how_fast_a_client_is() -> None:
    own, clients = planner(), [Client("a", 10), Client("b", 10)]
    plans = planned(own, clients)
    assert plans["a"].deadline_s is None
    seen = [observed(plans[name], compute_s=seconds, transfer_s=0.1) for name, seconds in (("a", 4.0), ("b", 400.0))]
    learned = own.observe(own.start(), seen)
    after = planned(own, clients, 6, learned)
    assert after["a"].deadline_s is not None
    assert after["a"].plan.rank >= after["b"].plan.rank
    assert (after["b"].plan.training.steps, TARGETS.depth(ranks_of(after["b"]))) != (10, 3)
    # 0 s is no time that training can take.
    assert own.observe(own.start(), [observed(plans["a"], compute_s=0.0, transfer_s=0.0)]).rates["a"].compute.count == 0


@given(
    st.lists(st.tuples(st.floats(2, 9), st.floats(0.1, 50), st.integers(1, 99)), min_size=1, max_size=5),
    st.sampled_from(["uniform", "gain", "random"]),
    st.sampled_from([(), ("int8", "nf4")]),
    st.integers(1, 4),
)
@settings(max_examples=25, deadline=None)
def test_no_plan_is_above_memory_or_budget_and_all_follow_from_the_names(
    rows: list[tuple[float, float, int]], importance: Any, formats: Any, rank: int
) -> None:
    speeds = {f"c{place}": fast(speed) for place, (_, speed, _) in enumerate(rows)}
    clients = [Client(f"c{place}", count, int(gb * 1e9)) for place, (gb, _, count) in enumerate(rows)]
    own = planner(speeds, rank=rank, importance=importance, base_dtypes=formats)
    learned = FedPipeMemory(rounds=2, importance=IMPORTANCE if importance == "gain" else None)
    plans = own.plan(learned, 3, clients)
    assert own.plan(learned, 3, clients[::-1]) == plans
    for client in clients:
        plan = plans[client.name]
        if isinstance(plan, Failure):
            least = min(WEIGHTS[name] for name in ("", *formats)) + 0.1 + 0.028
            assert client.memory_bytes / 1e9 < least + 1e-6
            continue
        ranks, training = ranks_of(plan), plan.plan.training
        depth, numbers = TARGETS.depth(ranks), TARGETS.cost(ranks)
        assert numbers <= rank * TARGETS.numbers(depth)
        assert training.batch * training.accumulation == 4
        need = WEIGHTS[plan.plan.base_dtype] + 0.1 * training.batch * depth + numbers / 1000
        assert need <= client.memory_bytes / 1e9 + 1e-9
        assert max(ranks) == plan.plan.rank
        permitted = choices(own.settings, rank, 0.0)
        assert permitted.ranks is not None
        assert plan.plan.rank in permitted.ranks


@given(st.floats(4.2, 6), st.floats(0, 2), st.floats(0.1, 20), st.floats(0, 30))
@settings(max_examples=20, deadline=None)
def test_more_memory_or_time_never_gains_less(gb: float, more: float, end: float, later: float) -> None:
    def worth(memory_gb: float, deadline_s: float) -> float:
        own = planner({"a": fast(1.0)}, deadline_s=deadline_s, least_share=0.1)
        plan = planned(own, [Client("a", 10, int(memory_gb * 1e9))])["a"]
        return float(gain(np.array(ranks_of(plan))).mean()) * (plan.plan.training.steps or 0)

    # Of options within 2 % of the best one another may be taken, and steps are whole.
    assert worth(gb + more, end) >= 0.97 * worth(gb, end) - 1
    assert worth(gb, end + later) >= 0.97 * worth(gb, end) - 1


def test_brute_force_finds_no_better_plan_for_one_site() -> None:
    """Over every depth, batch and rank of `uniform` for one client with a deadline, ten steps."""
    for end, gb in product((2.5, 3.3, 4.2, 6.0), (4.36, 4.7, 9.0)):
        own = planner({"a": fast(1.0)}, deadline_s=end, least_share=1.0, rank=3)
        plan = planned(own, [Client("a", 10, int(gb * 1e9))])["a"]
        best = 0.0
        for depth, batch, rank in product((1, 2, 3), (1, 2, 4), (1, 2, 3)):
            numbers = rank * TARGETS.numbers(depth)
            one = costs("a", Arm(0.0, rank, top=depth / 3), TRAINING)
            if one.tflop <= end and 4 + 0.1 * batch * depth + numbers / 1000 <= gb:
                best = max(best, TARGETS.count(depth) / len(MODULES) * float(gain(np.array(rank))))
        mine = float(gain(np.array(ranks_of(plan))).mean())
        if best:
            assert mine >= 0.98 * best - 1e-9


def test_a_base_without_a_cost_model_is_refused() -> None:
    inputs = PlannerInputs(seed=0, rounds=1, training=lambda client: (1, TRAINING), base="odd")
    with pytest.raises(ConfigError, match="'odd', for which no cost model exists"):
        PLANNER.create(FedPipeSettings(), inputs)
