"""The guard against divergence: what makes a round undone, what it leaves, and who cannot set it off alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions.consistency import STATE
from fedtune.directions.seed_ledger import describe_base
from fedtune.errors import RoundError
from fedtune.messages import (
    AdmittedUpdate,
    Blueprint,
    ClientUpdate,
    Measured,
    Plan,
    PlannedClient,
    ProbeResult,
    Training,
)
from fedtune.methods.fedkseed import METHOD
from fedtune.methods.fedkseed_guard import rise
from fedtune.methods.fedkseed_state import MOST_HALVINGS, FedKSeedSettings, FedKSeedState
from fedtune.methods.serialization import decode, encode

BASE = describe_base({"layer.weight": np.zeros((6, 10), np.float32)})
FIVE = ("ann", "bob", "cleo", "dan", "eve")
Pair = tuple[float | None, float | None]


def first(**changes: Any) -> FedKSeedState:
    chosen = FedKSeedSettings(**{"seeds": 8, "scalar_step": 2.0**-20, **changes})
    return METHOD.init(Blueprint({}, {}, max_rank=1, seed=3, manifest=BASE.encode()), chosen)


def update(state: FedKSeedState, client: str, losses: Pair, scalars: Sequence[int]) -> AdmittedUpdate:
    result = ProbeResult(np.array(scalars, np.int8), state=state.digest[:STATE], checks=state.checks)
    measured = Measured(loss_before=losses[0], loss_after=losses[1])
    return AdmittedUpdate(ClientUpdate(client, state.round + 1, 10, result, measured))


def after(
    state: FedKSeedState,
    before: float,
    end: float | None,
    lies: Mapping[str, Pair] | None = None,
    scalars: Sequence[int] = (9, -5, 7, 1),
) -> FedKSeedState:
    """Return the state after a round in which all five state these losses, but for those that lie."""
    cohort = [update(state, name, (lies or {}).get(name, (before, end)), scalars) for name in FIVE]
    return METHOD.aggregate(state, cohort)


def rate(state: FedKSeedState, learning_rate: float = 1e-3) -> float:
    training = Training(batch=1, learning_rate=learning_rate, steps=4)
    planned = PlannedClient(Plan("ann", rank=1, scale=1.0, training=training))
    return METHOD.assign(state, 3, planned).plan.training.rate


def test_a_rise_is_that_of_the_middle_client_by_hand() -> None:
    assert rise({"a": 2.0, "b": 4.0, "c": 4.0}, {"a": 3.0, "b": 5.0, "c": 4.0}) == 0.25
    assert rise({"a": 2.0, "b": 4.0}, {"a": 3.0, "b": 4.0}) == 0.0  # of two the smaller one: half is no majority
    assert rise({"a": 0.01}, {"a": 0.03}) == pytest.approx(0.05)  # of small losses a rise is noise
    assert rise({"a": 2.0}, {"b": 3.0}) == rise({}, {"a": 1.0}) == 0.0


def test_steps_that_raise_the_loss_by_a_quarter_are_not_added_and_the_rate_is_halved() -> None:
    state = after(first(), 4.0, 3.9)
    undone = after(state, 3.9, 5.0)
    assert undone.sums.tolist() == state.sums.tolist()
    assert (undone.round, undone.halvings) == (state.round + 1, 1)
    assert rate(undone) == 0.5 * rate(state) == 0.5e-3
    # A scalar of one is half as long: steps half as long keep their digits.
    assert undone.shift == state.shift - 1
    assert METHOD.figures(undone)["halvings"] == 1
    [remark] = METHOD.remarks(undone)
    assert "the loss rose by 28% in the middle client: the round is not added" in remark
    assert "halved (1 of 4 times)" in remark
    # Said once.
    assert METHOD.remarks(after(undone, 3.9, 3.8)) == ()


def test_a_model_that_gets_worse_from_round_to_round_goes_back_to_its_best_sums() -> None:
    state = after(first(), 4.0, 3.9)
    best = after(state, 3.9, 4.0)  # a rise by 0.026 within the steps: what is there now is stored
    assert best.best["a"].tolist() == state.sums.tolist()
    assert best.sums.tolist() != state.sums.tolist()
    worse = after(best, 4.0, 4.1)  # 0.026 above: may be noise
    assert worse.halvings == 0
    back = after(worse, 4.2, 4.2)  # 0.077 above
    assert back.halvings == 1
    assert back.sums.tolist() == state.sums.tolist()
    assert rate(back) == 0.5e-3
    # Whatever clients hold, they are sent what leads there.
    assert after(back, 3.9, 3.8).round == back.round + 1


def test_what_is_stored_follows_the_losses_down_and_is_dropped_when_they_are_calm() -> None:
    state = after(first(), 4.0, 4.1)
    assert state.watched == dict.fromkeys(FIVE, 4.0)
    lower = after(state, 3.8, 3.9)
    assert lower.watched == dict.fromkeys(FIVE, 3.8)
    assert lower.best["a"].tolist() == state.sums.tolist()
    calm = after(lower, 3.7, 3.7)
    assert (calm.watched, calm.best) == ({}, {})


def test_what_one_client_breaks_for_all_is_undone_a_round_later() -> None:
    """As where one client alone probes, at too long steps: the others go down, and the sums do not."""
    start = first()
    broken = after(start, 5.5, 5.4, {"eve": (5.5, 17.0)})
    assert (broken.halvings, broken.best["a"].tolist()) == (0, start.sums.tolist())
    back = after(broken, 8.3, 8.2)
    assert (back.halvings, back.sums.tolist()) == (1, start.sums.tolist())


def test_losses_that_are_finite_before_the_steps_alone_have_risen() -> None:
    assert after(first(), 4.0, None).halvings == 1
    assert after(first(), 4.0, 3.9, {"eve": (4.0, None)}).halvings == 0


@pytest.mark.parametrize("losses", [[(4.0, 3.9), (3.9, 3.93), (3.8, 3.81)], [(None, None)] * 3, [(0.02, 0.021)] * 3])
def test_a_run_that_goes_well_is_written_as_without_a_guard(losses: list[Any]) -> None:
    state = first()
    for before, end in losses:
        state = after(state, before, end)
    written = b"".join(encode(state))
    assert not any(name in written for name in (b"halvings", b"watched", b"best", b"rose"))


@pytest.mark.guarantee("G4")
@settings(deadline=None, max_examples=8)
@given(lie=st.tuples(*[st.one_of(st.none(), st.floats(0, 1e12))] * 2), liar=st.sampled_from(FIVE))
def test_one_liar_of_five_neither_sets_it_off_nor_holds_it_off(lie: Any, liar: str) -> None:
    state = after(first(), 4.0, 4.1)
    assert after(state, 3.9, 3.95, {liar: lie}).halvings == 0
    assert after(state, 3.9, 5.5, {liar: lie}).halvings == 1
    assert after(state, 4.4, 4.5, {liar: lie}).halvings == 1


def test_after_four_halvings_the_run_ends_with_what_to_do() -> None:
    state = first()
    for count in range(1, MOST_HALVINGS + 1):
        state = after(state, 4.0, 9.0)
        assert state.halvings == count
    assert rate(state) == 1e-3 / 16
    assert state.shift == 0
    with pytest.raises(RoundError, match=r"1/16 of the learning rate; got a rise by 125%.*smaller client") as why:
        after(state, 4.0, 9.0)
    assert why.value.final


def test_a_state_after_it_is_resumed_as_it_was() -> None:
    state = after(after(first(), 4.0, 4.1), 3.9, 6.0)
    again = decode(b"".join(encode(state)), like=first())
    assert b"".join(encode(again)) == b"".join(encode(state))
    assert (again.halvings, again.watched) == (1, dict.fromkeys(FIVE, 4.0))


def test_no_log_leads_over_a_round_that_was_undone() -> None:
    state = after(first(public_log=True), 4.0, 3.9)
    undone = after(state, 3.9, 6.0)
    order = METHOD.assign(undone, 3, PlannedClient(Plan("ann", 1, 1.0, Training(1, 1e-3, steps=4)))).probe
    assert order.state.form != "log"
    assert order.state.digest == undone.digest


def test_sizes_of_pro_are_in_the_finer_unit() -> None:
    state = after(first(sampling="pro"), 4.0, 3.9)
    undone = after(state, 3.9, 6.0)
    assert undone.drawn["sizes"].tolist() == (2 * state.drawn["sizes"]).tolist()
    assert undone.drawn["visits"].tolist() == state.drawn["visits"].tolist()


def test_sums_that_are_stored_get_zeros_for_newer_banks() -> None:
    state = replace(first(), best={"a": np.array([1, 2], np.int32)}, watched=dict.fromkeys(FIVE, 1.0))
    assert after(state, 4.0, 4.0).sums.tolist() == [1, 2, 0, 0, 0, 0, 0, 0]
