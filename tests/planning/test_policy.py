from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fedtune.planning.bandits import Thompson, Ucb
from fedtune.planning.deadline import Deadline
from fedtune.planning.policy import Arm, Observed, Policy
from fedtune.planning.random_choice import RandomChoice
from fedtune.planning.s_ucb import SUcb
from tests.planning.conftest import ARMS, candidate, seen

NAMES = ("ann", "bob", "cyd")
EVERY = {
    "random": RandomChoice(ARMS),
    "ucb": Ucb(ARMS),
    "thompson": Thompson(ARMS),
    "s-ucb": SUcb(ARMS),
    "deadline": Deadline(ARMS, explore=1),
}


@pytest.fixture(params=EVERY, ids=str)
def policy(request: pytest.FixtureRequest) -> Policy[object]:
    found: Any = EVERY[request.param]
    return found  # type: ignore[no-any-return]


def test_an_arm_that_does_not_fit_is_never_chosen(policy: Policy[object]) -> None:
    memory = policy.start()
    for round in range(1, 12):
        cohort = [
            candidate("ann", [9, 6, 3], feasible=[False, True, True]),
            candidate("bob", [9, 6, 3], feasible=[False, False, True]),
            candidate("cyd", [9, 6, 3]),
        ]
        choice = policy.choose(memory, round, cohort, key=round)
        assert choice.arms["ann"] in (1, 2)
        assert choice.arms["bob"] == 2
        assert set(choice.why) == set(choice.arms) == set(NAMES)
        memory = policy.learn(memory, [seen(name, ARMS[arm], gain=0.1 * arm) for name, arm in choice.arms.items()])


def test_choices_follow_from_names_and_not_from_their_order(policy: Policy[object]) -> None:
    cohort = [candidate(name, [9.0 - i, 6, 3]) for i, name in enumerate(NAMES)]
    memory, other = policy.start(), policy.start()
    for round in range(1, 6):
        one = policy.choose(memory, round, cohort, key=7)
        two = policy.choose(other, round, cohort[::-1], key=7)
        assert one.arms == two.arms
        observed = [seen(name, ARMS[arm], gain=0.3, seconds=1.0 + arm) for name, arm in one.arms.items()]
        memory, other = policy.learn(memory, observed), policy.learn(other, observed[::-1])


def test_what_was_learned_is_made_again_from_the_same_rounds(policy: Policy[object]) -> None:
    rounds = [
        [seen(name, ARMS[(i + k) % 3], gain=0.1 * i + 0.2, seconds=1.0 + i * k) for i, name in enumerate(NAMES)]
        for k in range(4)
    ]
    memories = []
    for _ in range(2):
        memory = policy.start()
        for each in rounds:
            memory = policy.learn(memory, each)
        memories.append(memory)
    cohort = [candidate(name, [9, 6, 3]) for name in NAMES]
    choices = [policy.choose(memory, 9, cohort, key=1) for memory in memories]
    assert choices[0] == choices[1]


HOSTILE: dict[str, Observed] = {
    "nothing known": seen("ann", ARMS[0], gain=None, seconds=None),
    "no time at all": seen("ann", ARMS[0], seconds=0.0),
    "negative time": seen("ann", ARMS[0], seconds=-5.0),
    "endless": seen("ann", ARMS[0], seconds=float("inf")),
    "NaN loss": seen("ann", ARMS[0], gain=float("nan")),
    "infinite loss": seen("ann", ARMS[0], gain=float("inf")),
    "late": seen("ann", ARMS[0], gain=None, late_s=9.0),
    "no work": replace(seen("ann", ARMS[0]), tflop=0.0, megabytes=0.0),
    "an arm of another recipe": seen("ann", Arm(0.875, 64)),
}


@pytest.mark.parametrize("bad", HOSTILE.values(), ids=HOSTILE)
def test_an_impossible_measurement_breaks_nothing(policy: Policy[object], bad: Observed) -> None:
    memory = policy.start()
    for round in range(1, 4):
        memory = policy.learn(memory, [bad, seen("bob", ARMS[1]), seen("cyd", ARMS[2])])
        choice = policy.choose(memory, round, [candidate(name, [9, 6, 3]) for name in NAMES], key=round)
        assert set(choice.arms.values()) <= {0, 1, 2}
        assert choice.deadline_s is None or 0 < choice.deadline_s < float("inf")


def test_an_empty_cohort_is_told_nothing(policy: Policy[object]) -> None:
    assert policy.choose(policy.start(), 1, [], key=0).arms == {}
    assert policy.choose(policy.learn(policy.start(), []), 1, [candidate("ann", [9, 6, 3])], key=0).arms.keys() == {
        "ann"
    }
