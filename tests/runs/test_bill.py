from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedtune.config import bind
from fedtune.config.recipe import Recipe
from fedtune.devices.cost import Body, roberta_base
from fedtune.devices.memory import memory
from fedtune.devices.profiles import PROFILES
from fedtune.messages import Training
from fedtune.planning.policy import Arm
from fedtune.pruning.depth import block_of, module_ranks
from fedtune.runs.bill import Bill, alternatives, bill_of, nearest
from fedtune.runs.fleet import Fleet, Lengths
from fedtune.runs.local import prepare

BODY = roberta_base()


def fleet_of(tables: dict[str, Any], memory_gb: float = 5.2) -> tuple[Fleet, Recipe]:
    recipe = bind(tables)
    board = replace(PROFILES["tx2"], memory_gb=memory_gb)
    return Fleet(recipe, BODY, {"ann": board}, {"ann": Lengths(64.0, 256.0)}), recipe


@pytest.mark.parametrize(
    ("rows", "has_gb", "words"),
    [
        (16, 2.9, "client.batch = 8 with client.accumulation = 2"),
        (1, 1.2, "client.gradient_checkpointing = true"),
        (1, 0.9, 'model.dtype = "int8"'),
        (1, 0.8, 'client.gradient_checkpointing = true, model.dtype = "nf4"'),
    ],
)
def test_the_nearest_setting_fits_and_is_the_least_painful(
    rows: int, has_gb: float, words: str, tables: dict[str, Any]
) -> None:
    fleet, recipe = fleet_of(tables)
    training = Training(batch=rows, steps=1, learning_rate=0.1)
    footprint = fleet.footprint("ann", Arm(0.0, 8), training)
    assert memory(BODY, None, footprint).total > has_gb * 1e9
    text = nearest(fleet, recipe, footprint, has_gb, training)
    assert words in text
    pains = [
        (pain, named)
        for pain, changed, named in alternatives(recipe, footprint, training, BODY)
        if memory(BODY, None, changed).total <= has_gb * 1e9
    ]
    assert text.startswith(", ".join(min(pains)[1]))


def test_where_nothing_fits_that_is_said(tables: dict[str, Any]) -> None:
    fleet, recipe = fleet_of(tables)
    training = Training(batch=16, steps=1, learning_rate=0.1)
    text = nearest(fleet, recipe, fleet.footprint("ann", Arm(0.0, 8), training), 0.3, training)
    assert text == "nothing that fedtune offers fits"


def test_rounds_after_the_rehearsed_ones_are_like_the_last() -> None:
    bill = Bill([], rounds=5, cohort=2, by_round=[(10, 4), (30, 4)], exact=True, at_most=False, round_s=2.0)
    assert bill.traffic == (10 + 4 * 30, 20)
    assert bill.seconds == 10.0
    assert replace(bill, rounds=1).traffic == (10, 4)


def test_a_fleet_is_billed_by_its_devices(tables: dict[str, Any]) -> None:
    tables["fleet"] = {"name": "fedspine80"}
    tables["device"] = [{"clients": ["client-2"], "memory_gb": 0.4}]
    experiment = prepare(bind(tables), sizes_alone=True)
    bill = bill_of(experiment.devices, experiment.blueprint, experiment.fleet)
    [small] = bill.too_large
    assert small.client == "client-2"
    assert small.nearest == "nothing that fedtune offers fits"
    assert bill.round_s is not None
    assert bill.round_s > 0
    assert all(each.compute_s is not None for each in bill.clients)


def test_seeds_are_billed_without_a_backward_pass(tables: dict[str, Any]) -> None:
    rest = {key: value for key, value in tables.items() if key not in ("adapter", "override")}
    rest |= {"method": {"name": "fedkseed", "seeds": 64}, "client": {"steps": 4, "batch": 4, "learning_rate": 2e-3}}
    experiment = prepare(bind(rest), sizes_alone=True)
    bill = bill_of(experiment.devices, experiment.blueprint, experiment.fleet)
    [parts] = {each.memory.by_part()["optimizer"] for each in bill.clients}
    assert parts == 0
    assert bill.at_most
    assert max(each.bytes_up for each in bill.clients) < 1000


@pytest.mark.parametrize(
    "more",
    [
        {"pruning": {}, "planner": {"name": "fixed"}},  # codes are not cut
        {"planner": {"name": "bandit"}, "pruning": {}},  # chooses blocks and ratios itself
        {"method": {"name": "fedkseed", "bank": "hadamard"}},  # rewrites the weights
        {"method": {"name": "zeropad"}},  # needs all modules of every client
    ],
)
def test_the_nearest_setting_is_one_that_the_recipe_may_have(more: dict[str, Any], tables: dict[str, Any]) -> None:
    for table, values in more.items():
        tables[table] = values
    if tables["method"]["name"] == "fedkseed":
        tables = {key: value for key, value in tables.items() if key not in ("adapter", "override")}
        tables["client"] = {"steps": 4, "batch": 4, "learning_rate": 2e-3}
    tables.pop("override", None)
    tables["method"].setdefault("name", "flora")
    fleet, recipe = fleet_of(tables)
    training = Training(batch=4, steps=1, learning_rate=0.1)
    footprint = fleet.footprint("ann", Arm(0.0, 8), training)
    advice = {word for _, _, words in alternatives(recipe, footprint, training, BODY) for word in words}
    assert advice
    for word in advice:
        bind(tables, overrides=[change for change in word.split(" with ")])


def test_fewer_blocks_of_an_odd_number_are_those_that_a_plan_trains(tables: dict[str, Any]) -> None:
    fleet, recipe = fleet_of(tables)
    body = replace(BODY, layout=replace(BODY.layout, blocks=BODY.layout.blocks[:5]))
    body = replace(body, modules={name: shape for name, shape in BODY.modules.items() if name_in(name, body)})
    footprint = replace(
        fleet.footprint("ann", Arm(0.0, 8), Training(batch=1, steps=1)), ranks=dict.fromkeys(body.modules, 8)
    )
    for _, changed, words in alternatives(recipe, footprint, Training(batch=1, steps=1), body):
        if list(words) == ["planner.top = 0.5"]:
            wanted = module_ranks(body.modules, body.layout, 8, 0.5)
            assert sorted(changed.ranks) == [n for n, r in zip(sorted(body.modules), wanted, strict=True) if r]
            return
    raise AssertionError("no alternative with fewer blocks")


def name_in(name: str, body: Body) -> bool:
    return block_of(name, body.layout) is not None


@pytest.mark.parametrize("where", ["planner", "override"])
def test_a_client_that_trains_the_upper_blocks_is_billed_for_them_alone(where: str, tables: dict[str, Any]) -> None:
    experiment = prepare(bind(tables), sizes_alone=True)
    whole = bill_of(experiment.devices, experiment.blueprint, experiment.fleet, calibration=(0.0, 1.0))
    arm = {"top": 0.5, "back": 0.5, "down_rank": 1}
    tables["override"] = [*tables.get("override", []), {"clients": ["client-*"], **arm}]
    if where == "planner":
        tables["override"] = tables["override"][:-1]
        tables["planner"] = {"name": "fixed", **arm}
    experiment = prepare(bind(tables), sizes_alone=True)
    upper = bill_of(experiment.devices, experiment.blueprint, experiment.fleet, calibration=(0.0, 1.0))
    for less, more in zip(upper.clients, whole.clients, strict=True):
        parts, all_parts = less.memory.by_part(), more.memory.by_part()
        assert parts["adapters"] < all_parts["adapters"]
        assert parts["activations"] < all_parts["activations"]
        assert less.compute_s is not None
        assert more.compute_s is not None
        assert less.compute_s < 0.9 * more.compute_s
        assert less.bytes_down < more.bytes_down
        assert less.bytes_up < more.bytes_up


def test_what_a_planner_learns_to_ask_for_is_not_called_exact(tables: dict[str, Any]) -> None:
    tables.pop("override", None)
    tables |= {"planner": {"name": "fedpipe"}, "fleet": {"name": "fedspine80"}}
    experiment = prepare(bind(tables), sizes_alone=True)
    bill = bill_of(experiment.devices, experiment.blueprint, experiment.fleet)
    assert bill.by_round
    assert bill.as_json()["bytes_are"] == "estimated"


SEEDS: dict[str, Any] = {
    "method": {"name": "fedkseed", "seeds": 64, "scalar_step": 1e-4},
    "client": {"steps": 4, "batch": 4},
}


def seeds_bill(tables: dict[str, Any], memory_gb: float | None = None, **changes: Any) -> Bill:
    rest = {key: value for key, value in tables.items() if key not in ("adapter", "override")}
    method = {**SEEDS["method"], **changes.pop("method", {})}
    experiment = prepare(bind({**rest, **SEEDS, "method": method, **changes}), sizes_alone=True)
    return bill_of(experiment.devices, experiment.blueprint, experiment.fleet, memory_gb=memory_gb)


def test_each_client_is_billed_for_its_verb(tables: dict[str, Any]) -> None:
    bill = seeds_bill(tables, override=[{"clients": ["client-1"], "verb": "descend"}], method={"groups": 4})
    verbs = {each.client: each.verb for each in bill.clients}
    assert verbs == {name: "descend" if name == "client-1" else "probe" for name in verbs}
    descending = next(each for each in bill.clients if each.verb == "descend")
    probing = next(each for each in bill.clients if each.verb == "probe")
    # A number of a byte each: four groups of 64; a probing client's are as many as it has steps.
    assert 4 * 64 < descending.bytes_up < 4 * 64 + 100
    assert 4 < probing.bytes_up < 4 + 100
    assert descending.memory.optimizer > probing.memory.optimizer == 0
    assert len({each.group for each in bill.clients}) == 2
    assert bill.as_json()["clients"]["client-1"]["verb"] == "descend"
    assert bill.traffic[1] >= bill.rounds * sum(each.bytes_up for each in bill.clients) * bill.cohort / len(
        bill.clients
    )


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_the_bytes_of_a_descending_client_follow_from_its_bits(bits: int, tables: dict[str, Any]) -> None:
    method = {"verb": "descend", "scalar_bits": bits, "seeds": 4096}
    bill = seeds_bill(tables, method=method, client={"batch": 4})
    [up] = {each.bytes_up for each in bill.clients}
    assert 4096 * bits / 8 < up < 4096 * bits / 8 + 100


def test_memory_decides_who_is_billed_for_descending(tables: dict[str, Any]) -> None:
    auto = {"verb": "auto"}
    needs = {each.client: each.memory.total for each in seeds_bill(tables, method=auto).clients}
    enough = seeds_bill(tables, method=auto, memory_gb=max(needs.values()) / 1e9).clients
    assert {each.verb for each in enough} == {"descend"}
    little = seeds_bill(tables, method=auto, memory_gb=min(needs.values()) / 1e9 - 1e-6).clients
    assert {each.verb for each in little} == {"probe"}
    assert all(each.memory.total < needs[each.client] and each.fits for each in little)
