from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from fedtune.errors import ShapeError
from fedtune.tasks import VERBS, Plan, ProbeSeeds, Training, TrainLora

PLAN = Plan("a", 8, 2.0, Training(steps=1))


def test_plans_cannot_be_edited() -> None:
    with pytest.raises(FrozenInstanceError):
        PLAN.rank = 9  # type: ignore[misc]


def test_every_task_has_a_name_of_its_own_in_recipes() -> None:
    assert VERBS[TrainLora] == "adapt"
    assert VERBS[ProbeSeeds] == "probe"
    assert len(set(VERBS.values())) == len(VERBS)


def test_ranks_are_by_module_in_sorted_order_and_those_of_rank_0_are_left_out() -> None:
    assert PLAN.rank_of(["y", "x"]) == {"x": 8, "y": 8}
    assert replace(PLAN, ranks=(0, 8, 3)).rank_of(["z", "x", "y"]) == {"y": 8, "z": 3}


@pytest.mark.parametrize("ranks", [(8,), (8, 8, 8, 8), (0, 0, 0), (8, 9, 1), (4, 4, 4)])
def test_ranks_that_are_not_the_bases_are_refused(ranks: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"ranks: expected one for each of 3 modules, the largest 8; got \d"):
        replace(PLAN, ranks=ranks).rank_of("xyz")
