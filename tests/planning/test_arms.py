from __future__ import annotations

import pytest

from fedtune.planning.arms import AdaptiveSettings, Setting, arms_of, compute_share, goal_of, ratios_of, sparing_arms
from fedtune.planning.policy import Arm

WHOLE = Setting(rank=8)


def test_there_are_nine_arms_beside_those_that_save_memory() -> None:
    settings = AdaptiveSettings()
    arms = arms_of(settings, WHOLE)
    plain = [arm for arm in arms if arm not in sparing_arms(settings, arms)]
    assert plain == [Arm(0.0, rank, share=share) for rank in (2, 4, 8) for share in (1.0, 0.5, 0.25)]
    assert {(arm.top, arm.back) for arm in arms} == {(top, back) for top in (1.0, 0.6, 0.4) for back in (0.0, 0.5)}


def test_arms_that_a_recipe_lists_are_for_all() -> None:
    settings = AdaptiveSettings(tops=(1, 0.5))
    arms = arms_of(settings, WHOLE)
    assert {arm.top for arm in arms if arm not in sparing_arms(settings, arms)} == {1.0, 0.5}
    assert {arm.back for arm in arms if arm not in sparing_arms(settings, arms)} == {0.0}


def test_ranks_are_whole_numbers_above_0() -> None:
    assert {arm.rank for arm in arms_of(AdaptiveSettings(), Setting(rank=1))} == {1}
    assert {arm.rank for arm in arms_of(AdaptiveSettings(), Setting(rank=3))} == {1, 2, 3}


def test_arms_do_not_depend_on_the_order_of_a_list_nor_on_repetitions() -> None:
    one = AdaptiveSettings(ranks=(8, 2, 8), tops=(0.5, 1), shares=(1,), backs=(0,), down_ranks=(16, 4))
    other = AdaptiveSettings(ranks=(2, 8), tops=(1, 0.5, 1), shares=(1, 1), backs=(0,), down_ranks=(4, 16, 4))
    assert arms_of(one, WHOLE) == arms_of(other, WHOLE)
    assert len(arms_of(one, WHOLE)) == 2 * 2 * 2


def test_pruned_arms_train_all_that_is_left() -> None:
    """Else there were as many arms again that hardly differ."""
    arms = arms_of(AdaptiveSettings(), Setting(rank=8, target=0.3, pruned=True))
    assert sorted({arm.ratio for arm in arms}) == [0.0, 0.25, 0.3, 0.5, 0.75]
    assert {(arm.top, arm.back) for arm in arms if arm.ratio} == {(1.0, 0.0)}
    assert len([arm for arm in arms if arm.ratio]) == 4 * 9


def test_without_the_table_pruning_nothing_is_pruned() -> None:
    assert ratios_of(AdaptiveSettings(ratios=(0, 0.5)), pruned=False, target=0.5) == (0.0,)


def test_bases_and_methods_that_cannot_have_only_the_arms_they_can() -> None:
    arms = arms_of(AdaptiveSettings(), Setting(rank=8, partial=False, selective=False))
    assert {(arm.top, arm.back) for arm in arms} == {(1.0, 0.0)}


@pytest.mark.parametrize(
    ("goal", "target", "expected"),
    [("auto", 0.5, "both"), ("auto", 0.0, "whole"), ("whole", 0.5, "whole"), ("deployed", 0.5, "deployed")],
)
def test_the_goal_follows_from_what_is_deployed(goal: str, target: float, expected: str) -> None:
    assert goal_of(AdaptiveSettings(goal=goal), target) == expected  # type: ignore[arg-type]


def test_what_an_arm_takes_of_the_operations() -> None:
    """The specification's arms: top half and half of the backward pass .625, with half of the steps as well .3125."""
    assert compute_share(Arm(0.0, 8)) == 1.0
    assert compute_share(Arm(0.5, 8)) == 0.5
    assert compute_share(Arm(0.0, 8, top=0.5, back=0.5)) == pytest.approx(0.625)
    assert compute_share(Arm(0.0, 8, back=0.5)) == 0.75
