from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.planning.arms import AdaptiveSettings, Setting, arms_of
from fedtune.planning.policy import Arm
from fedtune.planning.quality import gains, hypotheses, quality, shares, updated_likelihood
from tests.planning.conftest import seen

DEFAULT = arms_of(AdaptiveSettings(), Setting(rank=8, target=0.5, pruned=True))


def test_quality_by_hand() -> None:
    """pn .55, w 2, rn 1.5; exponents 1, 1, .5 and .1: (1 - .25 / .3025) (1 - e^-2) .5 .5 .5^.5 .5^.1."""
    of = np.array([[0.55, 2.0, 1.5, 1.0, 1.0, 0.5, 0.1]])
    arms = (Arm(0.5, 3, 0.5, 0.5, 0.5, 4), Arm(0.0, 3, down_rank=8), Arm(0.6, 3))
    expected = (1 - 0.25 / 0.3025) * (1 - np.exp(-2)) * 0.5 * 0.5 * 0.5**0.5 * 0.5**0.1
    assert quality(arms, of)[0] == pytest.approx([expected, 1 - np.exp(-2), 0.0])


def test_whatever_an_arm_leaves_out_never_adds_to_its_quality() -> None:
    found = quality(DEFAULT, hypotheses(DEFAULT))
    assert ((found >= 0) & (found <= 1)).all()
    for one, first in enumerate(DEFAULT):
        for other, second in enumerate(DEFAULT):
            less = second.ratio >= first.ratio and second.back >= first.back and second.rank <= first.rank
            if less and second.top <= first.top and second.share <= first.share:
                assert (found[:, other] <= found[:, one] + 1e-12).all()


def test_what_does_not_differ_between_arms_multiplies_no_hypotheses() -> None:
    assert len(hypotheses((Arm(0.0, 8), Arm(0.0, 8, share=0.5)))) == 3
    assert len(hypotheses((Arm(0.0, 8), Arm(0.5, 8)))) == 15
    assert len(hypotheses(DEFAULT)) == 15 * 4 * 27


@pytest.mark.parametrize(("share_gain", "top_gain"), [(0.95, 0.5), (0.82, 0.95)])
def test_rounds_teach_what_each_saving_costs(share_gain: float, top_gain: float) -> None:
    arms = (Arm(0.0, 8), Arm(0.0, 8, top=0.4), Arm(0.0, 8, share=0.5))
    of = hypotheses(arms)
    likely: tuple[float, ...] = ()
    for round in range(10):
        level = 0.8**round
        seen_now = [(arms[0], level), (arms[1], level * top_gain), (arms[2], level * share_gain)] * 3
        likely = updated_likelihood(likely, seen_now, arms, of)
    said = shares(likely, of) @ quality(arms, of)
    assert said[1] / said[0] == pytest.approx(top_gain, abs=0.12)
    assert said[2] / said[0] == pytest.approx(share_gain, abs=0.12)


@given(st.floats(-1e300, 1e300), st.integers(0, 8))
def test_one_liar_changes_little(claim: float, place: int) -> None:
    """Gains beyond ten medians count no more; a claim of 1e300 once made the round teach nothing at all."""
    arms = (Arm(0.0, 8), Arm(0.0, 8, share=0.5))
    of = hypotheses(arms)
    honest = [(arms[i % 2], (1.0, 0.6)[i % 2]) for i in range(9)]
    told = [*honest]
    told[place] = (told[place][0], claim)
    likely = updated_likelihood((), told, arms, of)
    assert np.isfinite(likely).all()
    said = shares(likely, of) @ quality(arms, of)
    assert 0.5 < said[1] / said[0] < 0.95


def test_gains_are_of_the_whole_model_where_they_were_measured_there() -> None:
    pruned, whole = seen("bob", Arm(0.5, 8), gain=0.5), seen("ann", Arm(0.0, 8), gain=0.25)
    assert gains([pruned, whole], "own") == [(Arm(0.0, 8), 0.25), (Arm(0.5, 8), 0.5)]
    # A client that cannot hold the whole base says nothing of it.
    assert gains([pruned, whole], "whole") == [(Arm(0.0, 8), 0.25)]
    measured = replace(pruned, whole_loss_before=2.0, whole_loss_after=2.125)
    assert gains([measured], "whole") == [(Arm(0.5, 8), -0.125)]
    # Before it, the client trained a pruned model, whose loss says nothing of the whole one's.
    came = replace(whole, whole_loss_before=3.0, whole_loss_after=2.5)
    assert gains([came], "whole") == [(Arm(0.0, 8), 0.5)]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf"), None])
def test_losses_that_are_no_numbers_teach_nothing(loss: float | None) -> None:
    assert gains([replace(seen("ann", Arm(0.0, 8)), loss_after=loss)], "own") == []


def test_arms_of_another_release_teach_nothing_here() -> None:
    arms = (Arm(0.0, 8), Arm(0.0, 8, share=0.5))
    assert updated_likelihood((), [(Arm(0.125, 2), 1.0)] * 5, arms, hypotheses(arms)) == ()
