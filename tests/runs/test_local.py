from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedtune.config import bind
from fedtune.messages import Client, PlannedClient
from fedtune.methods.method import GlobalModel
from fedtune.runs.local import Experiment, prepare, score

# peft asks transformers by a name that transformers is about to drop
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


@pytest.fixture
def prepared(tables: dict[str, Any]) -> Experiment:
    return prepare(bind(tables))


def test_the_fleet_counts_training_examples_only(prepared: Experiment) -> None:
    assert prepared.fleet == {"client-0": 6, "client-1": 6, "client-2": 6}  # of 8 rows each a quarter is held out
    plans = prepared.planner.plan(None, 1, [Client(name, 6) for name in prepared.fleet])
    ranks = {name: each.plan.rank for name, each in plans.items() if isinstance(each, PlannedClient)}
    assert ranks == {"client-0": 4, "client-1": 2, "client-2": 8}


def test_scores_are_made_of_what_is_asked_for(prepared: Experiment) -> None:
    evaluate = replace(prepared.recipe.evaluate, examples=2, client_examples=1)
    prepared = replace(prepared, recipe=replace(prepared.recipe, evaluate=evaluate))
    on_test = score(prepared, GlobalModel(), test=True, clients=False)
    assert on_test.test is not None
    assert (on_test.test["examples"], on_test.held_out) == (2, {})
    on_clients = score(prepared, GlobalModel(), test=False, clients=True)
    assert on_clients.test is None
    assert {name: held["examples"] for name, held in on_clients.held_out.items()} == dict.fromkeys(prepared.fleet, 1)


def test_a_client_that_nobody_knew_gets_the_recipes_plan(prepared: Experiment) -> None:
    plans = prepared.planner.plan(None, 1, [Client("client-2", 10), Client("new", 10)])
    assert [each.plan.rank for each in plans.values() if isinstance(each, PlannedClient)] == [8, 4]
