from __future__ import annotations

import numpy as np

from fedtune.planning.oracle import Oracle
from tests.planning.conftest import ARMS, candidate


def test_it_chooses_by_what_is_true_and_not_by_what_is_known() -> None:
    true = {"ann": np.array([1.0, 8.0, 9.0]), "bob": np.array([9.0, 1.0, 9.0])}
    policy = Oracle(ARMS, lambda round, each: true[each.client], lambda round, each: np.array([0.5, 0.5, 1.0]))
    cohort = [candidate("ann", [9, 9, 1]), candidate("bob", [9, 9, 1])]
    choice = policy.choose(None, 1, cohort, key=0)
    assert choice.arms == {"ann": 0, "bob": 1}
    assert choice.deadline_s == 1.25
    assert policy.choose(None, 1, [], key=0).arms == {}


def test_it_knows_memory_too() -> None:
    policy = Oracle(ARMS, lambda round, each: np.ones(3), lambda round, each: np.array([3.0, 2.0, 1.0]))
    cohort = [candidate("ann", [1, 1, 1], feasible=[False, True, True])]
    assert policy.choose(None, 1, cohort, key=0).arms == {"ann": 1}
