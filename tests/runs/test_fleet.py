from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

import fedtune
from fedtune.config.recipe import Objects
from fedtune.devices.simulated_clock import SimulatedClock
from fedtune.errors import ConfigError, RoundError
from fedtune.messages import Blueprint, Client, Measured, Plan, Traffic, Training
from fedtune.planning.adaptive import Adaptive
from fedtune.planning.fixed import Fixed
from fedtune.planning.planner import PlannerInputs
from fedtune.planning.policy import Arm, Candidate
from fedtune.pruning.depth import module_ranks
from fedtune.pruning.structure import Block, BlockLayout
from fedtune.rounds.clock import CompletedWork
from fedtune.runs.fleet import Fleet, Lengths, fleet_of, speed

NAMES = [f"client-{i:02}" for i in range(8)]
ANATOMY = BlockLayout("llama", (Block("model.layers.0", 4, 4, 8, 64),), width=32, head=320, outputs=10)
BLUEPRINT = Blueprint({"model.layers.0.self_attn.q_proj": (32, 32)}, {}, max_rank=8, seed=0, anatomy=ANATOMY)
TRAINING = Training(batch=4, learning_rate=0.1, steps=2)
DEEP = replace(
    BLUEPRINT,
    modules={f"model.layers.{at}.self_attn.q_proj": (32, 32) for at in range(4)},
    anatomy=replace(ANATOMY, blocks=tuple(Block(f"model.layers.{at}", 4, 4, 8, 64) for at in range(4))),
)


@pytest.fixture
def made(tables: dict[str, Any]) -> Callable[..., Fleet]:
    def make(blueprint: Blueprint = BLUEPRINT, **changes: Any) -> Fleet:
        rest = {key: value for key, value in tables.items() if key != "override"}
        recipe = fedtune.bind({**rest, "fleet": {"name": "fedspine80"}, **changes})
        return fleet_of(recipe, NAMES, replace(blueprint, pruning=recipe.pruning), parameters=20_000)

    return make


def test_devices_are_the_fleets_with_what_the_recipe_changes(made: Callable[..., Fleet]) -> None:
    changed = [
        {"clients": ["client-0[01]"], "profile": "nano"},
        {"clients": ["client-00"], "memory_gb": 1.5},
    ]
    fleet = made(device=changed)
    assert fleet.profiles["client-01"].name == "nano"
    assert (fleet.profiles["client-00"].name, fleet.profiles["client-00"].memory_gb) == ("nano*2", 1.5)
    told = fleet.summary()
    assert told["profiles"]["nano*2"]["memory_gb"] == {"value": "1.5", "provenance": "recipe"}
    assert told["profiles"]["nano*2"]["memory_gbps"]["provenance"] == "datasheet"
    assert "proxy" not in told["clock"]


def test_kinds_that_a_recipe_makes_are_told_apart(made: Callable[..., Fleet]) -> None:
    changed = [
        {"clients": ["client-00"], "profile": "tx2", "memory_gb": 1.0},
        {"clients": ["client-01"], "profile": "tx2", "memory_gbps": 9.0},
    ]
    told = made(device=changed).summary()
    one, other = (told["profiles"][told["clients"][name]] for name in ("client-00", "client-01"))
    assert (one["memory_gb"]["value"], other["memory_gb"]["value"]) == ("1", "5.2")
    assert other["memory_gbps"] == {"value": "9", "provenance": "recipe"}


def test_a_device_that_is_nobodys_is_refused(made: Callable[..., Fleet]) -> None:
    with pytest.raises(
        ConfigError, match=r"device\.0\.clients: expected names or patterns of clients \(client-00.*none"
    ):
        made(device=[{"clients": ["nobody"], "memory_gb": 1.0}])


def test_a_proxy_is_said_to_be_one_and_costs_what_it_costs(made: Callable[..., Fleet]) -> None:
    small, large = made(), made(fleet={"name": "fedspine80", "proxy": "llama-7b"})
    assert "proxy: operations, bytes and memory are those of llama-7b" in large.summary()["clock"]
    arm = Arm(0.0, 8)
    assert large.cost("client-00", arm, TRAINING).tflop > 1000 * small.cost("client-00", arm, TRAINING).tflop
    tx2 = Client(next(name for name, profile in small.profiles.items() if profile.name == "tx2"), 1)
    assert "has 5.2 GB" in large.misfit(tx2, arm, TRAINING)
    assert not small.misfit(tx2, arm, TRAINING)
    done = CompletedWork(Plan("client-00", 8, 2.0, TRAINING), Measured(tokens=100), Traffic(1000, 1000), 0.0)
    assert large.load(done).bytes_up > 1000 * small.load(done).bytes_up == 1000 * 1000


def test_the_clock_charges_what_the_planner_expected(made: Callable[..., Fleet]) -> None:
    fleet = made()
    work = fleet.work("client-00", TRAINING, 8)
    tokens = int(work.trained_tokens)
    done = CompletedWork(Plan("client-00", 8, 2.0, TRAINING), Measured(tokens=tokens), Traffic(1, 1), 0.0)
    assert fleet.load(done).tflop == pytest.approx(fleet.cost("client-00", Arm(0.0, 8), TRAINING).tflop)
    clock = fleet.clock()
    assert isinstance(clock, SimulatedClock)
    assert clock.client_times(1, 0.0, {"client-00": done}, {})["client-00"].seconds > 0


@pytest.mark.parametrize("proxy", ["none", "llama-7b"])
def test_the_clock_charges_an_arm_what_the_planner_expected(made: Callable[..., Fleet], proxy: str) -> None:
    """Also where a larger model stands in, of which the same share of the blocks is charged."""
    fleet = made(DEEP, fleet={"name": "fedspine80", "proxy": proxy})
    assert fleet.body is not None
    arm = Arm(0.0, 8, top=0.5, back=0.5, down_rank=4)
    ranks = module_ranks(fleet.body.modules, fleet.body.layout, 8, 0.5)
    assert 0 in ranks
    plan = Plan("client-00", 8, 2.0, TRAINING, ranks=ranks, back=0.5)
    tokens = int(fleet.work("client-00", TRAINING, 8).trained_tokens)
    done = CompletedWork(plan, Measured(tokens=tokens), Traffic(1, 1), 0.0, down_rank=4)
    assert fleet.load(done).tflop == pytest.approx(fleet.cost("client-00", arm, TRAINING).tflop)
    whole, dense = fleet.cost("client-00", Arm(0.0, 8), TRAINING), replace(done, plan=replace(plan, ranks=(), back=0.0))
    assert fleet.load(done).tflop < 0.8 * fleet.load(dense).tflop
    assert fleet.load(done).gigabytes == pytest.approx(1.25 / 2 * fleet.load(dense).gigabytes)
    assert fleet.cost("client-00", arm, TRAINING).megabytes < 0.7 * whole.megabytes


def test_the_oracle_is_told_the_clocks_own_times(made: Callable[..., Fleet]) -> None:
    fleet = made(fleet={"name": "fedspine80", "by": "round"}, planner={"name": "oracle", "ranks": [2, 8]})
    costs = [fleet.cost("client-03", Arm(0.0, rank), TRAINING) for rank in (2, 8)]
    candidate = Candidate(
        "client-03", 1.0, (True, True), tuple(c.tflop for c in costs), tuple(c.megabytes for c in costs), (1.0, 1.0)
    )
    clock = fleet.clock()
    assert isinstance(clock, SimulatedClock)
    seconds = fleet.true_seconds(4, candidate, [Arm(0.0, 2), Arm(0.0, 8)])
    for cost, rank, told in zip(costs, (2, 8), seconds, strict=True):
        half = int(cost.megabytes / 2 * 1e6)
        plan, measured = (
            Plan("client-03", rank, 2.0, TRAINING),
            Measured(tokens=int(fleet.work("client-03", TRAINING, rank).trained_tokens)),
        )
        done = CompletedWork(plan, measured, Traffic(half, half), 0.0)
        assert told == pytest.approx(
            clock.client_times(4, 77.0, {"client-03": done}, {})["client-03"].seconds, rel=1e-3
        )


def test_each_planner_is_made_of_its_name(made: Callable[..., Fleet]) -> None:
    assert isinstance(made().planner(BLUEPRINT), Fixed)
    assert isinstance(made(planner={"name": "s-ucb"}).planner(BLUEPRINT), Adaptive)
    assert made().clock() is not None


def test_a_base_without_a_cost_model_takes_the_fixed_planner_and_no_fleet(tables: dict[str, Any]) -> None:
    strange = replace(BLUEPRINT, anatomy=None)
    rest = {key: value for key, value in tables.items() if key != "override"}
    plain = fleet_of(fedtune.bind(rest), NAMES, strange, parameters=1)
    assert isinstance(plain.planner(strange), Fixed)
    assert plain.clock() is None
    assert plain.summary() == {}
    with pytest.raises(ConfigError, match=r"planner: expected a base of llama, .* for a planner that weighs costs"):
        fleet_of(fedtune.bind({**rest, "planner": "random"}), NAMES, strange, parameters=1).planner(strange)
    with pytest.raises(ConfigError, match=r"fleet: expected a base of llama, .*for which no cost model exists"):
        fleet_of(fedtune.bind({**rest, "fleet": {"name": "orin8"}}), NAMES, strange, parameters=1)


def test_a_planner_knows_the_means_of_a_profile() -> None:
    from fedtune.devices.profiles import PROFILES

    found = speed(PROFILES["agx-xavier"])
    assert found.s_per_tflop == pytest.approx(1 / (4.0 * 0.6375))
    assert found.s_per_mb == pytest.approx(0.8)
    assert found.overhead_s == 0.5  # latency is in every transfer that is measured


@pytest.mark.parametrize(
    ("method", "rank", "expected"),
    [
        ("flora", 8, ""),
        ("zeropad", 9, "client-00: expected rank 8 at most; got 9"),
        ("fedit", 8, ""),
        ("fedit", 4, "client-00: expected rank 8 for all clients; got 4"),
    ],
)
def test_ranks_of_a_planner_object_are_those_that_the_method_can_combine(
    tables: dict[str, Any], method: str, rank: int, expected: str
) -> None:
    class Chosen:
        def __init__(self, inputs: PlannerInputs) -> None:
            self.inputs = inputs

        def start(self) -> int:
            return 0

        def plan(self, learned: int, round: int, cohort: Any) -> Any:
            return {client.name: self.inputs.plan(client, rank=rank) for client in cohort}

        def observe(self, learned: int, seen: Any) -> int:
            return learned + 1

    rest = {key: value for key, value in tables.items() if key != "override"}
    recipe = fedtune.bind({**rest, "method": method}, objects=Objects(planner=Chosen))
    planner = fleet_of(recipe, NAMES, BLUEPRINT, parameters=20_000).planner(BLUEPRINT)
    assert planner.observe(planner.start(), []) == 1
    if expected:
        with pytest.raises(RoundError, match=expected):
            planner.plan(0, 1, [Client("client-00", 10)])
    else:
        assert planner.plan(0, 1, [Client("client-00", 10)]).keys() == {"client-00"}


def test_a_base_format_changes_memory_and_time_and_nothing_else(made: Callable[..., Fleet]) -> None:
    fleet, arm = made(), Arm(0.0, 2)
    plain = fleet.cost_by_format("client-00", arm, TRAINING, "")
    counted = fleet.cost("client-00", arm, TRAINING)
    assert plain.tflop == pytest.approx(counted.tflop)
    assert plain.megabytes == counted.megabytes
    assert plain.memory_gb == pytest.approx(fleet.memory("client-00", arm, TRAINING).total / 1e9)
    nf4 = fleet.cost_by_format("client-00", arm, TRAINING, "nf4")
    assert nf4.tflop == pytest.approx(1.39 * plain.tflop)
    assert nf4.megabytes == plain.megabytes
    assert nf4.memory_parts["weights"] < plain.memory_parts["weights"]
    assert nf4.memory_gb == pytest.approx(sum(nf4.memory_parts.values()))
    # Of the same kind, by another batch: what is counted once must not stay for it.
    small = replace(TRAINING, batch=1, accumulation=4)
    assert fleet.cost_by_format("client-01", arm, small, "").memory_gb == pytest.approx(
        fleet.memory("client-01", arm, small).total / 1e9
    )
    assert fleet.cost_by_format("client-01", arm, small, "").tflop == pytest.approx(plain.tflop)


def test_a_client_of_fedtune_holds_the_codes_beside_its_base(made: Callable[..., Fleet]) -> None:
    fleet = replace(made(), profiles={})
    plain, nf4 = (fleet.cost_by_format("client-00", Arm(0.0, 2), TRAINING, name) for name in ("", "nf4"))
    assert nf4.memory_parts["weights"] > plain.memory_parts["weights"]


SEEDS = {
    "method": {"name": "fedkseed", "bank": "kron", "seeds": 256},
    "adapter": {"rank": 1, "targets": ["all-linear"]},
}


def probed(client: str, tokens: int) -> CompletedWork:
    plan = Plan(client, 1, 1.0, TRAINING)
    return CompletedWork(plan, Measured(tokens=tokens), Traffic(9000, 300), 0.0)


def test_by_hand_what_probing_seeds_costs_a_device(made: Callable[..., Fleet]) -> None:
    fleet = replace(made(**SEEDS), tokens={"client-00": Lengths(10.0, 12.0)})
    load = fleet.load(probed("client-00", 160))  # two seeds, both sides, four rows of ten tokens
    # One block of width 32 with 4 heads of 8 and 64 channels, a head of 320; p = 16.
    weights, both = 4 * 32 * 32 + 3 * 32 * 64, 4 * 64 + 3 * 96
    per_token = 2 * (weights + 320) + 4 * 10 * 32 + 2 * 16 * both + 2 * 16 * 16 * 7
    assert load.tflop == pytest.approx(160 * per_token / 1e12)
    assert load.gigabytes == pytest.approx(4 * 20_000 * 4 / 1e9)  # four passes over all weights
    assert (load.bytes_down, load.bytes_up) == (9000, 300)


def test_seeds_are_as_many_bytes_of_a_larger_model_and_more_work(made: Callable[..., Fleet]) -> None:
    small, large = made(**SEEDS), made(**SEEDS, fleet={"name": "phones", "proxy": "smollm2-135m"})
    one, other = (fleet.load(probed("client-00", 160)) for fleet in (small, large))
    assert (other.bytes_down, other.bytes_up) == (one.bytes_down, one.bytes_up)
    assert other.tflop > 1000 * one.tflop
    clock = large.clock()
    assert clock is not None
    spent = clock.client_times(1, 0.0, {"client-00": probed("client-00", 160)}, {})["client-00"]
    assert spent.joules is not None
    assert spent.joules > 2.9 * spent.compute_s  # watts of the weakest phone
