from __future__ import annotations

from dataclasses import replace

import pytest

from fedtune.messages import Client, Training
from fedtune.planning import PLANNERS
from fedtune.planning.fixed import Fixed
from fedtune.planning.planner import Planner, PlannerInputs, PlannerType, lora_scale, optimizer_steps

TRAINING = Training(batch=4, learning_rate=0.1, steps=7)


def test_fixed_is_a_planner() -> None:
    planner: Planner = Fixed(lambda name: (1, TRAINING), "2r", False)
    assert planner.plan(None, 1, []) == {}


@pytest.mark.parametrize("name", sorted(PLANNERS))
def test_the_table_names_each_planner_and_its_settings(name: str) -> None:
    kind = PLANNERS[name]
    assert isinstance(kind, PlannerType)
    assert kind.name == name
    assert kind.settings(name=name).name == name


def test_inputs_plan_a_client_as_the_recipe_trains_it() -> None:
    training = replace(TRAINING, steps=None, epochs=1.0)
    inputs = PlannerInputs(seed=0, rounds=1, training=lambda name: (4, training))
    plan, wide = inputs.plan(Client("ann", 17)).plan, inputs.plan(Client("ann", 17), rank=16, ratio=0.5).plan
    assert inputs.plan(Client("ann", 17), steps=2).plan.training.steps == 2
    assert (plan.rank, plan.scale, plan.training.steps, plan.training.epochs, plan.ratio) == (4, 2.0, 5, None, 0.0)
    assert (wide.rank, wide.scale, wide.ratio) == (16, 2.0, 0.5)


def test_the_scale_is_alpha_over_the_rank_or_its_root() -> None:
    assert lora_scale(16, 32.0, rslora=False) == 2.0
    assert lora_scale(16, 32.0, rslora=True) == 8.0
    assert lora_scale(16, "2r", rslora=False) == 2.0


@pytest.mark.parametrize(("epochs", "examples", "expected"), [(1.0, 16, 4), (1.0, 17, 5), (0.01, 5, 1), (2.5, 16, 10)])
def test_epochs_become_steps_rounded_up(epochs: float, examples: int, expected: int) -> None:
    assert optimizer_steps(replace(TRAINING, steps=None, epochs=epochs), examples) == expected


def test_accumulated_batches_count_as_one_step() -> None:
    assert optimizer_steps(replace(TRAINING, steps=None, epochs=1.0, accumulation=4), 64) == 4


def test_given_steps_do_not_depend_on_the_examples() -> None:
    assert optimizer_steps(TRAINING, 1) == optimizer_steps(TRAINING, 10_000) == 7
