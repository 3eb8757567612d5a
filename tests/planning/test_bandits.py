from __future__ import annotations

from typing import Any

import pytest

from fedtune.planning.bandits import BanditMemory, Plays, Thompson, Ucb
from fedtune.planning.policy import Arm, Policy
from fedtune.planning.s_ucb import SUcb
from tests.planning.conftest import ARMS, candidate, seen

TWO = (Arm(0.0, 4), Arm(0.5, 4))


def test_the_bound_by_hand() -> None:
    """Means .5 and .4 after 4 and 1 plays, spread .1: the one played once has the larger bound, .5897 over .5794."""
    bounds = [Ucb.bound(Plays(4, 2.0), 5, 0.1), Ucb.bound(Plays(1, 0.4), 5, 0.1)]
    assert bounds == pytest.approx([0.5897, 0.5794], abs=1e-4)
    plays = {"ann": {TWO[0]: Plays(4, 2.0), TWO[1]: Plays(1, 0.4)}}
    memory = BanditMemory(plays, recent=(0.4, 0.6))
    assert memory.deviation == pytest.approx(0.1)
    assert Ucb(TWO).choose(memory, 1, [candidate("ann", [2, 1])], key=0).arms == {"ann": 0}


def test_arms_that_were_never_played_come_first() -> None:
    policy = Ucb(ARMS)
    memory, played = policy.start(), []
    for round in range(3):
        arm = policy.choose(memory, round, [candidate("ann", [9, 6, 3])], key=0).arms["ann"]
        played.append(arm)
        others = [seen("bob", ARMS[0], gain=0.5), seen("cyd", ARMS[0], gain=0.7)]
        memory = policy.learn(memory, [seen("ann", ARMS[arm], gain=0.6), *others])
    assert played == [0, 1, 2]


@pytest.mark.parametrize("policy", [Ucb(ARMS), Thompson(ARMS)], ids=["ucb", "thompson"])
def test_the_arm_that_pays_most_is_played_most(policy: Ucb | Thompson) -> None:
    memory, played = policy.start(), []
    for round in range(120):
        arm = policy.choose(memory, round, [candidate("ann", [9, 6, 3])], key=5).arms["ann"]
        played.append(arm)
        others = [seen("bob", ARMS[0], gain=0.5), seen("cyd", ARMS[0], gain=0.5)]
        memory = policy.learn(memory, [seen("ann", ARMS[arm], gain=(0.1, 1.0, 0.3)[arm]), *others])
    assert played[-60:].count(1) > 30


@pytest.mark.parametrize("policy", [Ucb(ARMS), Thompson(ARMS), SUcb(ARMS)], ids=["ucb", "thompson", "s-ucb"])
def test_an_arm_that_never_comes_home_is_given_up(policy: Policy[Any]) -> None:
    memory, played = policy.start(), list[int]()
    for round in range(1, 40):
        choice = policy.choose(memory, round, [candidate(name, [1, 1, 1]) for name in ("ann", "bob", "cyd")], key=round)
        played.append(choice.arms["ann"])
        lost = choice.arms["ann"] == 0
        ann = seen("ann", ARMS[choice.arms["ann"]], late_s=99.0 if lost else None, gain=None if lost else 1.0)
        memory = policy.learn(memory, [ann, seen("bob", ARMS[choice.arms["bob"]]), seen("cyd", ARMS[1])])
    assert played[-20:].count(0) < 5


@pytest.mark.parametrize("policy", [Ucb(ARMS), SUcb(ARMS)], ids=["ucb", "s-ucb"])
def test_without_a_clock_losses_alone_teach(policy: Policy[Any]) -> None:
    memory, played = policy.start(), list[int]()
    for round in range(1, 60):
        choice = policy.choose(memory, round, [candidate(name, [1, 1, 1]) for name in ("ann", "bob", "cyd")], key=round)
        played.append(choice.arms["ann"])
        gain = 2.0 if choice.arms["ann"] == 1 else 0.1
        rest = [seen(name, ARMS[choice.arms[name]], seconds=None) for name in ("bob", "cyd")]
        memory = policy.learn(memory, [seen("ann", ARMS[choice.arms["ann"]], gain=gain, seconds=None), *rest])
    assert played[-30:].count(1) > 15


def test_one_claim_does_not_drown_all_others() -> None:
    round = [seen("liar", ARMS[0], seconds=1e9), seen("ann", ARMS[1]), seen("bob", ARMS[1], seconds=2.0)]
    assert Ucb(ARMS).learn(Ucb(ARMS).start(), round).deviation < 10


def test_one_client_learns_nothing_of_anothers_arms() -> None:
    policy = Ucb(ARMS)
    memory = policy.learn(policy.start(), [seen("ann", ARMS[0]), seen("bob", ARMS[1])])
    assert memory.plays["ann"].keys() == {ARMS[0]}
    assert memory.plays["bob"].keys() == {ARMS[1]}
