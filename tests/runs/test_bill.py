from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedtune.config import bind
from fedtune.config.recipe import Recipe
from fedtune.devices.cost import roberta_base
from fedtune.devices.memory import memory
from fedtune.devices.profiles import PROFILES
from fedtune.messages import Training
from fedtune.planning.policy import Arm
from fedtune.runs.bill import Bill, alternatives, bill_of, nearest, upper
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
        for pain, changed, named in alternatives(recipe, footprint, training)
        if memory(BODY, None, changed).total <= has_gb * 1e9
    ]
    assert text.startswith(", ".join(min(pains)[1]))


def test_where_nothing_fits_that_is_said(tables: dict[str, Any]) -> None:
    fleet, recipe = fleet_of(tables)
    training = Training(batch=16, steps=1, learning_rate=0.1)
    text = nearest(fleet, recipe, fleet.footprint("ann", Arm(0.0, 8), training), 0.3, training)
    assert text == "nothing that fedtune offers fits"


def test_the_upper_modules_are_those_of_the_last_blocks() -> None:
    names = [f"layers.{i}.q" for i in range(4)] + ["head"]
    assert upper(names, 0.5) == {"layers.2.q", "layers.3.q", "head"}
    assert upper(names, 0.1) == {"layers.3.q", "head"}


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
