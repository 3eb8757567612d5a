from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.planning.policy import Arm
from fedtune.planning.s_ucb import ROOT, Leaf, SUcb, Tree, TreeMemory
from tests.planning.conftest import ARMS, candidate, seen


def test_the_first_play_splits_across_the_first_side_where_it_was_drawn() -> None:
    """Played at (.6, .2): leaves x < .6 and x >= .6; the left one is the larger, and is next."""
    left, right = ROOT.split((0.6, 0.2))
    assert (left.x, right.x, left.y) == ((0.0, 0.6), (0.6, 1.0), (0.0, 1.0))
    tree = Tree((left, right), ((0.9, 0.5, 1.0),))
    found, bound = SUcb(ARMS).best_leaf(tree, 1.0, [(0.1, 0.1), (0.9, 0.5)])
    assert (found, bound) == (left, float("inf"))


def test_a_split_lies_in_the_middle_half_and_small_leaves_stay() -> None:
    assert ROOT.split((0.01, 0.5))[0].x == (0.0, 0.25)
    assert ROOT.split((0.99, 0.5))[0].x == (0.0, 0.75)
    tall = Leaf((0.0, 0.25), (0.0, 1.0))
    assert tall.split((0.1, 0.5))[0].y == (0.0, 0.5)
    assert Leaf((0.0, 0.15), (0.0, 0.15)).split((0.1, 0.1)) == (Leaf((0.0, 0.15), (0.0, 0.15)),)


@given(st.lists(st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)), max_size=30))
def test_leaves_cover_the_square_without_overlap(points: list[tuple[float, float]]) -> None:
    leaves: tuple[Leaf, ...] = (ROOT,)
    for point in points:
        leaves = tuple(part for leaf in leaves for part in (leaf.split(point) if leaf.holds(point) else (leaf,)))
    assert sum(leaf.area for leaf in leaves) == pytest.approx(1.0)
    for point in points:
        assert sum(leaf.holds(point) for leaf in leaves) == 1


def test_children_inherit_what_was_played_in_them() -> None:
    policy = SUcb(ARMS)
    cohort = [seen("ann", ARMS[0], gain=1.0), seen("bob", ARMS[1], gain=1.0), seen("cyd", ARMS[2], gain=1.0)]
    memory = policy.learn(policy.learn(policy.start(), cohort), cohort)
    tree = memory.clients["ann"]
    assert len(tree.played) == 2
    assert len(tree.leaves) == 3
    place = policy.place(ARMS[0])
    assert sum(leaf.holds(place) for leaf in tree.leaves) == 1


def test_leaves_that_hold_nothing_that_fits_are_dead() -> None:
    policy = SUcb(ARMS)
    left, right = ROOT.split((0.5, 0.5))
    memory = TreeMemory({"ann": Tree((left, right), ((0.1, 0.9, 0.0), (0.9, 0.1, 5.0)))}, (0.0, 5.0))
    only_small = candidate("ann", [9, 6, 3], feasible=[True, False, False])
    assert policy.choose(memory, 1, [only_small], key=0).arms == {"ann": 0}


def test_the_leaf_that_paid_is_preferred_once_all_were_tried() -> None:
    policy = SUcb(ARMS)
    left, right = ROOT.split((0.5, 0.5))
    played = tuple((0.1, 0.5, 0.1) for _ in range(20)) + tuple((0.9, 0.5, 0.9) for _ in range(20))
    memory = TreeMemory({"ann": Tree((left, right), played)}, (0.1, 0.12, 0.11))
    arms = {policy.choose(memory, round, [candidate("ann", [9, 6, 3])], key=0).arms["ann"] for round in range(9)}
    assert arms <= {1, 2}


def test_a_client_of_twice_the_median_time_earns_half_for_the_same_gain() -> None:
    cohort = [seen("ann", ARMS[0]), seen("bob", ARMS[0], seconds=2.0), seen("cyd", ARMS[0])]
    memory = SUcb(ARMS).learn(SUcb(ARMS).start(), cohort)
    (_, _, quick), (_, _, slow) = memory.clients["ann"].played[0], memory.clients["bob"].played[0]
    assert slow == pytest.approx(quick / 2)


def test_progress_in_pruning_is_paid_and_a_step_back_is_not() -> None:
    policy, others = SUcb(ARMS), [seen("bob", ARMS[0]), seen("cyd", ARMS[0])]
    up = policy.learn(policy.start(), [seen("ann", Arm(0.5, 4)), *others]).clients["ann"]
    back = policy.learn(
        policy.learn(policy.start(), [seen("ann", Arm(0.5, 4)), *others]), [seen("ann", Arm(0.0, 16)), *others]
    ).clients["ann"]
    assert up.played[0][2] > back.played[1][2]
    assert back.ratio == 0.0
