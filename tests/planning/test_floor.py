from __future__ import annotations

from typing import Any

import pytest

from fedtune.planning.arms import Goal
from fedtune.planning.floor import Floor
from fedtune.pruning.ranking import PruningSettings

RATIOS = (0.0, 0.25, 0.5, 0.75)


def floor(goal: Goal = "both", rounds: int = 10, *, ranking: bool = True, **pruning: Any) -> Floor:
    return Floor(goal, rounds, RATIOS, PruningSettings(**pruning), ranking)


def allowed(of: Floor, round: int, client: str = "ann", kind: str = "tx2", *, holds: bool = True) -> list[float]:
    return list(filter(of.ratio_test(round, client, kind, holds_whole=holds), RATIOS))


def test_a_device_that_holds_the_whole_base_is_never_pruned() -> None:
    """The ramp of 0.2.0 pruned it by at least .44 from round 3 of 8, whatever a planner knew."""
    for goal in ("whole", "both"):
        assert all(allowed(floor(goal), round) == [0.0] for round in range(1, 11))


def test_a_device_that_does_not_is_free_until_the_last_fifth_of_the_rounds() -> None:
    small = [allowed(floor(), round, holds=False) for round in range(1, 11)]
    assert small == [list(RATIOS)] * 8 + [[0.5]] * 2
    assert [allowed(floor("whole"), round, holds=False) for round in (1, 10)] == [list(RATIOS)] * 2


def test_where_the_deployed_model_alone_counts_all_end_in_its_structure() -> None:
    assert [allowed(floor("deployed"), round) for round in (8, 9)] == [list(RATIOS), [0.5]]


@pytest.mark.parametrize(
    ("client", "kind", "deploys"), [("site-3", "", True), ("ann", "tx2", True), ("ann", "agx", False)]
)
def test_the_classes_that_deploy_are_named_by_client_or_profile(client: str, kind: str, deploys: bool) -> None:
    of = floor(deployed_on=("site-*", "tx2"))
    for holds in (True, False):
        assert of.deploys_pruned(client, kind, holds_whole=holds) is deploys
    assert allowed(of, 10, client, kind) == ([0.5] if deploys else [0.0])
    assert of.gain_of(client, kind, holds_whole=True) == ("both" if deploys else "whole")


def test_without_a_ranking_the_first_round_prunes_no_client() -> None:
    assert allowed(floor(ranking=False), 1, holds=False) == [0.0]
    assert allowed(floor(ranking=False, policy="local"), 1, holds=False) == list(RATIOS)


def test_a_target_that_is_no_arm_is_the_nearest_one() -> None:
    assert allowed(floor(target=0.4), 10, holds=False) == [0.5]
    assert allowed(floor(target=0.375), 10, holds=False) == [0.25]  # of two as near the smaller loses less


def test_voters_share_one_ratio_in_every_round() -> None:
    of = floor(policy="vote")
    assert {tuple(allowed(of, round, holds=holds)) for round in range(2, 11) for holds in (True, False)} == {(0.5,)}


def test_without_a_target_nothing_is_bound() -> None:
    of = floor("whole", target=0.0)
    assert [allowed(of, 10, holds=holds) for holds in (True, False)] == [[0.0], list(RATIOS)]


def test_the_ramp_of_earlier_releases_rises_for_all_and_ends_at_the_target() -> None:
    of = floor(floor="ramp")
    settings = PruningSettings()
    for round in range(1, 11):
        least = min(allowed(of, round))
        assert least >= min(0.5, settings.ratio(round, 10))
        assert (allowed(of, round) == [0.5]) == (round >= 8)
    assert of.gain_of("ann", "", holds_whole=True) == "own"
    assert allowed(floor(floor="ramp", target=0.0), 9) == list(RATIOS)
