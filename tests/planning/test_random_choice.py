from __future__ import annotations

from collections import Counter

from fedtune.planning.random_choice import RandomChoice
from tests.planning.conftest import ARMS, candidate


def test_every_arm_that_fits_is_drawn_about_as_often() -> None:
    policy = RandomChoice(ARMS)
    cohort = [candidate("ann", [9, 6, 3], feasible=[True, False, True])]
    drawn = Counter(policy.choose(None, round, cohort, key=0).arms["ann"] for round in range(400))
    assert drawn.keys() == {0, 2}
    assert abs(drawn[0] - 200) < 50
