from __future__ import annotations

from typing import get_args

import pytest

from fedtune.planning.adaptive import AdaptiveSettings, PolicyName
from fedtune.planning.bandits import Ucb
from fedtune.planning.deadline import Deadline
from fedtune.planning.policies import POLICIES, PolicyInputs, arms_of, few, policy_of
from fedtune.planning.policy import Arm


def test_the_table_names_what_settings_may() -> None:
    assert set(POLICIES) == set(get_args(PolicyName))


def test_arms_are_all_pairs_and_only_ranks_without_pruning() -> None:
    assert len(arms_of(AdaptiveSettings(), pruned=True)) == 35
    assert arms_of(AdaptiveSettings(ranks=(8, 2)), pruned=False) == (Arm(0.0, 2), Arm(0.0, 8))


def test_ucb_has_few_arms_and_one_that_fits_small_devices() -> None:
    policy = policy_of(AdaptiveSettings(name="ucb"), pruned=True)
    assert isinstance(policy, Ucb)
    assert {(arm.ratio, arm.rank) for arm in policy.arms} == {
        (ratio, rank) for ratio in (0.0, 0.25, 0.5, 0.75) for rank in (4, 16)
    }
    assert few((Arm(0.0, 8),)) == (Arm(0.0, 8),)
    aimed = policy_of(AdaptiveSettings(name="ucb"), pruned=True, inputs=PolicyInputs(target=0.375))
    assert 0.375 in {arm.ratio for arm in aimed.arms}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_made_of_its_settings(name: str) -> None:
    settings = AdaptiveSettings(name=name, explore=2, deadline_s=9.0)  # type: ignore[arg-type]
    policy = policy_of(settings, pruned=True, inputs=PolicyInputs(true_seconds=lambda round, each: [1.0], server_s=3.0))
    assert policy.arms
    if isinstance(policy, Deadline):
        assert policy.server_s == 3.0
        assert (policy.true_seconds is not None) == (name == "oracle")
