"""A small synthetic fleet: the planner that learns speeds beats the bandits, and comes near to who knows everything."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from tests.planning.conftest import ARMS, candidate

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "planner.py"


OURS = ("bandit", "bandit, probe", "deadline")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("planner_bench", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["planner_bench"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("seed", [0, 1])
def test_bandit_and_deadline_come_near_the_oracle_and_beat_the_controls(bench: ModuleType, seed: int) -> None:
    world = bench.World(seed, 12, 12, 30)
    goal = bench.GOAL * world.rounds

    def seconds(round: int, each: object) -> object:
        compute, transfer = world.seconds(each.client, round)  # type: ignore[attr-defined]
        return compute + transfer

    def worth(round: int, each: object) -> object:
        return world.worth(each.client, round)  # type: ignore[attr-defined]

    ideal = bench.reached(*bench.played(world, bench.Oracle(bench.ARMS, seconds, worth), prior=None), goal)
    times = {
        name: bench.reached(
            *bench.played(world, bench.narrowed(case.policy), prior=case.prior, probed=case.probed), goal
        )
        / ideal
        for name, case in bench.policies(world).items()
        if name in (*OURS, "ucb, few arms", "s-ucb", "thompson", "random")
    }
    assert all(times[name] < 1.5 for name in OURS)
    assert times["bandit, probe"] < 1.35
    assert max(times[name] for name in OURS) < min(other for name, other in times.items() if name not in OURS)


def test_the_oracle_chooses_by_what_is_true_and_not_by_what_is_known(bench: ModuleType) -> None:
    true = {"ann": np.array([1.0, 8.0, 9.0]), "bob": np.array([9.0, 1.0, 9.0])}
    policy = bench.Oracle(ARMS, lambda round, each: true[each.client], lambda round, each: np.array([0.5, 0.5, 1.0]))
    choice = policy.choose(None, 1, [candidate("ann", [9, 9, 1]), candidate("bob", [9, 9, 1])], key=0)
    assert choice.arms == {"ann": 0, "bob": 1}
    assert choice.deadline_s == 1.25
    assert policy.choose(None, 1, [], key=0).arms == {}


def test_the_oracle_knows_memory_too(bench: ModuleType) -> None:
    policy = bench.Oracle(ARMS, lambda round, each: np.ones(3), lambda round, each: np.array([3.0, 2.0, 1.0]))
    cohort = [candidate("ann", [1, 1, 1], feasible=[False, True, True])]
    assert policy.choose(None, 1, cohort, key=0).arms == {"ann": 1}
