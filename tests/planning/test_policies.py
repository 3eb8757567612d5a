from __future__ import annotations

from typing import get_args

import pytest

from fedtune.planning.arms import AdaptiveSettings, PolicyName, Setting
from fedtune.planning.bandits import Ucb
from fedtune.planning.deadline import Deadline
from fedtune.planning.policies import POLICIES, PolicyInputs, few, policy_of
from fedtune.planning.policy import Arm


def test_the_table_names_what_settings_may() -> None:
    assert set(POLICIES) == set(get_args(PolicyName))


def test_ucb_has_few_arms_and_one_that_fits_small_devices() -> None:
    settings = AdaptiveSettings(name="ucb", ranks=(2, 4, 8, 16, 32))
    policy = policy_of(settings, Setting(rank=8, target=0.5, pruned=True))
    assert isinstance(policy, Ucb)
    assert {(arm.ratio, arm.rank) for arm in policy.arms} == {
        (ratio, rank) for ratio in (0.0, 0.25, 0.5, 0.75) for rank in (4, 16)
    }
    whole = {(arm.top, arm.back, arm.share) for arm in policy.arms if arm.ratio == 0}
    assert whole == {(1.0, 0.0, 1.0), (0.4, 0.0, 1.0), (1.0, 0.5, 1.0), (1.0, 0.0, 0.25)}
    assert few((Arm(0.0, 8),)) == (Arm(0.0, 8),)
    run = Setting(rank=8, target=0.375, pruned=True)
    aimed = policy_of(AdaptiveSettings(name="ucb"), run, PolicyInputs(target=0.375))
    assert 0.375 in {arm.ratio for arm in aimed.arms}


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_made_of_its_settings(name: str) -> None:
    settings = AdaptiveSettings(name=name, explore=2, deadline_s=9.0)  # type: ignore[arg-type]
    inputs = PolicyInputs(true_seconds=lambda round, each, arms: [1.0], server_s=3.0)
    policy = policy_of(settings, Setting(rank=8, target=0.5, pruned=True), inputs)
    assert policy.arms
    if isinstance(policy, Deadline):
        assert policy.server_s == 3.0
        assert policy.draws == (name == "bandit")
        assert (policy.true_seconds is not None) == (name == "oracle")
