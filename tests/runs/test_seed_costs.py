"""What probing and descending cost a device: by hand on a small model, and who of a fleet does which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import pytest

import fedtune
from fedtune.config import bind
from fedtune.config.recipe import Objects
from fedtune.devices.cost import largest_tensor, llama_7b, rebuild_flops, smollm2_135m
from fedtune.devices.memory import Footprint
from fedtune.errors import ConfigError
from fedtune.messages import (
    Blueprint,
    Client,
    Failure,
    Measured,
    Plan,
    PlannedClient,
    Traffic,
    Training,
    Verb,
)
from fedtune.methods import METHODS
from fedtune.methods.fedkseed_state import FedKSeedSettings
from fedtune.planning.policy import Arm
from fedtune.pruning.structure import Block, BlockLayout
from fedtune.rounds.clock import CompletedWork
from fedtune.runs.fleet import Fleet, Lengths, fleet_of
from fedtune.runs.seed_costs import round_tokens, seed_flops, seed_footprint

NAMES = ["gpu-0", "phone-0"]
ANATOMY = BlockLayout("llama", (Block("model.layers.0", 4, 4, 8, 64),), width=32, head=320, outputs=10)
BLUEPRINT = Blueprint({"model.layers.0.self_attn.q_proj": (32, 32)}, {}, max_rank=8, seed=0, anatomy=ANATOMY)
BLOCKS = 4 * 32 * 32 + 3 * 32 * 64
"""Weights of the linear layers."""


@dataclass(frozen=True)
class OwnSettings:
    name: Literal["own"] = "own"


DESCENT = Training(batch=4, learning_rate=0.02, steps=2)


@pytest.fixture
def made(tables: dict[str, Any]) -> Callable[..., Fleet]:
    def make(method: dict[str, Any], **changes: Any) -> Fleet:
        rest = {key: value for key, value in tables.items() if key not in ("override", "adapter", "client")}
        recipe = fedtune.bind({**rest, "method": {"name": "fedkseed", **method}, "fleet": "phones", **changes})
        fleet = fleet_of(recipe, NAMES, BLUEPRINT, parameters=20_000)
        return replace(fleet, tokens=dict.fromkeys(NAMES, Lengths(10.0, 12.0)))

    return make


def work(verb: Verb, tokens: int, training: Training = DESCENT) -> CompletedWork:
    plan = Plan("gpu-0", 1, 1.0, training)
    return CompletedWork(plan, Measured(tokens=tokens), Traffic(9000, 300), 0.0, verb=verb)


def test_by_hand_what_descending_costs_a_device(made: Callable[..., Fleet]) -> None:
    fleet = made({"seeds": 256, "verb": "descend"})
    load = fleet.load(work("descend", 80))  # two steps of four rows of ten tokens
    per_token = 6 * (BLOCKS + 320) + 12 * 10 * 32
    rebuilt = 4 * 20_000 * (8 + 8)  # two rebuilds, two projections; log2 of 256 additions, and the signs
    assert load.tflop == pytest.approx((80 * per_token + rebuilt) / 1e12)
    assert load.gigabytes == pytest.approx(6 * 2 * 20_000 * 4 / 1e9)
    assert (load.bytes_down, load.bytes_up) == (9000, 300)


def test_by_hand_what_descending_beside_frozen_weights_costs(made: Callable[..., Fleet]) -> None:
    fleet = made({"seeds": 256, "bank": "kron", "verb": "descend"})
    load = fleet.load(work("descend", 80))
    both = 4 * 64 + 3 * 96
    per_token = 4 * (BLOCKS + 320) + 12 * 10 * 32 + 6 * 16 * both + 6 * 16 * 16 * 7
    assert load.tflop == pytest.approx(80 * per_token / 1e12)
    assert load.gigabytes == pytest.approx(2 * 2 * 20_000 * 4 / 1e9)


def test_probing_pays_for_moving_the_weights_with_every_pass(made: Callable[..., Fleet]) -> None:
    hadamard, kron = (made({"seeds": 256, "bank": bank}).load(work("probe", 160)) for bank in ("hadamard", "kron"))
    per_token = 2 * (BLOCKS + 320) + 4 * 10 * 32
    # The weights once, of log2 of 256 additions and the signs; then the signs of one direction for each pass.
    assert hadamard.tflop == pytest.approx((160 * per_token + 20_000 * (16 + 4 * 8)) / 1e12)
    assert hadamard.gigabytes == pytest.approx(4 * kron.gigabytes)


@pytest.mark.parametrize("bank", ["hadamard", "kron"])
@pytest.mark.parametrize("verb", ["probe", "descend"])
def test_tokens_expected_of_a_round_are_those_that_the_clock_charges(
    made: Callable[..., Fleet], bank: str, verb: Verb
) -> None:
    fleet = made({"seeds": 256, "bank": bank, "verb": "auto"})
    settings = fleet.recipe.method
    assert isinstance(settings, FedKSeedSettings)
    tokens = round_tokens(verb, settings, DESCENT, 10.0)
    assert tokens == (80 if verb == "descend" else 160)
    expected = seed_flops(fleet.charged, settings, verb, DESCENT, tokens, 10.0) / 1e12
    assert fleet.load(work(verb, int(tokens))).tflop == pytest.approx(expected)


def test_queries_of_one_side_share_their_first_loss() -> None:
    settings = FedKSeedSettings(estimator="one-sided", queries=4)
    assert round_tokens("probe", settings, replace(DESCENT, steps=8), 10.0) == (8 + 2) * 4 * 10


def test_the_largest_gradient_is_of_the_output_or_the_embeddings() -> None:
    assert largest_tensor(smollm2_135m()) == 28_311_552  # 49,152 x 576, which embeddings and output share
    embeddings = llama_7b().parameters - 32 * 202_375_168 - 131_072_000
    assert largest_tensor(llama_7b()) == embeddings == pytest.approx(131_072_000, rel=0.01)


def test_descending_needs_more_memory_than_probing_and_kron_the_least(made: Callable[..., Fleet]) -> None:
    need = {
        (bank, verb): made({"seeds": 256, "bank": bank, "verb": "auto"}).memory("gpu-0", Arm(0.0, 1), DESCENT, verb)
        for bank in ("hadamard", "kron")
        for verb in ("probe", "descend")
    }
    assert need["hadamard", "descend"].weights == need["hadamard", "probe"].weights == 2 * need["kron", "probe"].weights
    # One gradient at a time: here of the embeddings, in float32.
    assert need["hadamard", "descend"].optimizer == 4 * (20_000 - BLOCKS - 320)
    assert need["kron", "descend"].optimizer == need["kron", "probe"].optimizer == 0
    for verb in ("probe", "descend"):
        assert need["kron", verb].total < need["hadamard", verb].total
    for bank in ("hadamard", "kron"):
        assert need[bank, "probe"].activations < need[bank, "descend"].activations


def test_memory_decides_who_descends_and_the_plan_says_why(made: Callable[..., Fleet]) -> None:
    method, client = {"seeds": 256, "verb": "auto"}, {"steps": 3, "batch": 4}
    usual = made(method)
    need = [usual.memory("phone-0", Arm(0.0, 1), DESCENT, verb).total for verb in ("probe", "descend")]
    small = {"clients": ["phone-*"], "memory_gb": sum(need) / 2e9}
    fleet = made(method, device=[small], client=client)
    plans = fleet.planner(BLUEPRINT).plan(None, 1, [Client(name, 9) for name in NAMES])
    strong, weak = plans["gpu-0"], plans["phone-0"]
    assert isinstance(strong, PlannedClient)
    assert isinstance(weak, PlannedClient)
    assert (strong.verb, weak.verb) == ("auto", "probe")
    assert (strong.plan.training.steps, weak.plan.training.steps) == (8, 3)
    assert "GB of memory to descend; has 0.5 GB" in weak.why
    told = {name: fleet.verb(name, 9, fleet.profiles[name].memory_gb) for name in NAMES}
    assert {name: verb for name, (verb, _) in told.items()} == {"gpu-0": "descend", "phone-0": "probe"}
    assert told["phone-0"][1] == weak.plan.training
    assert fleet.verb("phone-0", 9, None)[0] == "descend"


def test_a_device_that_must_descend_and_cannot_sits_out(made: Callable[..., Fleet]) -> None:
    small = {"clients": ["phone-*"], "memory_gb": 0.5002}
    fleet = made({"seeds": 256, "verb": "descend"}, device=[small])
    plan = fleet.planner(BLUEPRINT).plan(None, 1, [Client("phone-0", 9)])["phone-0"]
    assert isinstance(plan, Failure)
    assert plan.kind == "unfit"


def test_gaussian_directions_cost_a_number_per_seed_and_weight() -> None:
    body = smollm2_135m()
    assert rebuild_flops(body, "gaussian", 1024) > 500 * rebuild_flops(body, "hadamard", 1024)
    assert rebuild_flops(body, "kron", 1024) == 0
    usual = Footprint(ranks={}, rows=1, longest=1.0)
    plain, stored = (
        seed_footprint(usual, body, FedKSeedSettings(bank=bank), "probe") for bank in ("hadamard", "gaussian")
    )
    assert stored.moved == pytest.approx(plain.moved * (1 + 4.25 / 4))  # displacements and signs stay in memory


def test_seeds_of_another_package_have_no_simulated_devices(tables: dict[str, Any]) -> None:
    own = replace(METHODS["fedkseed"], name="own", settings=OwnSettings, faults=lambda settings, steps: ())
    rest = {key: value for key, value in tables.items() if key not in ("override", "adapter")}
    with pytest.raises(ConfigError, match="fleet: expected no table with 'own'"):
        bind({**rest, "method": {"name": "own"}, "fleet": "phones"}, objects=Objects(method=own))
