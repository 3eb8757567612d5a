"""By hand: two clients of rank 1 and alpha 2, one layer of 2 x 2."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict

from fedtune.errors import RoundError, WireError
from fedtune.flower.peft_records import PeftState, to_record
from fedtune.flower.stock_round import (
    Federation,
    check_untrained,
    combine,
    global_change,
    global_state,
    order,
    read_reply,
    sent_state,
    shown_rank,
)
from fedtune.lora import lowrank
from fedtune.lora.adapter import delta
from fedtune.messages import Blueprint, ClientUpdate
from fedtune.methods import METHODS
from fedtune.methods.fedit import FedItSettings
from fedtune.methods.flexlora import FlexLoraSettings
from fedtune.tensors import Array

BLUEPRINT = Blueprint({"layer": (2, 2)}, {}, max_rank=1, seed=0)
FLEX = Federation(
    METHODS["flexlora"],
    BLUEPRINT,
    "base_model.model.",
    rank=1,
    alpha=lambda rank: 2.0,
    exact_changes=lambda state: lowrank.unpack(state.total),
)
STATE = METHODS["flexlora"].init(BLUEPRINT, FlexLoraSettings(wire_dtype="fp32"))


def state_of(a: Array, b: Array) -> PeftState:
    return PeftState({"layer.a": np.array(a, np.float32), "layer.b": np.array(b, np.float32)}, {})


def reply(a: list[list[float]], b: list[list[float]], examples: int = 1) -> RecordDict:
    record = to_record(state_of(np.array(a), np.array(b)))
    return RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": examples})})


def read(name: str, content: RecordDict) -> ClientUpdate:
    asked = order(FLEX, STATE, name, 1)
    update = read_reply(FLEX, asked, content, arrays_key="arrays", examples_key="num-examples")
    assert isinstance(update, ClientUpdate)
    return update


def test_the_scale_is_alpha_over_the_rank_or_its_root() -> None:
    assert FLEX.scale(4) == 0.5
    assert replace(FLEX, use_rslora=True).scale(4) == 1.0


def test_two_replies_are_summed_by_their_examples_with_the_scale_in() -> None:
    updates = [read("bob", reply([[1, 0]], [[1], [0]], 3)), read("ann", reply([[0, 1]], [[0], [2]], 1))]
    orders = {name: order(FLEX, STATE, name, 1) for name in ("ann", "bob")}
    combined = combine(FLEX, STATE, orders, updates)
    assert [update.client for update in combined.used] == ["ann", "bob"]
    # 2 * (3/4 * e1 e1' + 1/4 * 2 e2 e2')
    assert np.allclose(delta(global_change(FLEX, combined.state)["layer"]), [[1.5, 0.0], [0.0, 1.0]], atol=1e-6)


def test_the_model_in_the_runs_rank_holds_a_stated_share_of_the_sum() -> None:
    updates = [read("ann", reply([[1, 0]], [[1.5], [0]])), read("bob", reply([[0, 1]], [[0], [0.5]]))]
    orders = {name: order(FLEX, STATE, name, 1) for name in ("ann", "bob")}
    state, share = global_state(FLEX, combine(FLEX, STATE, orders, updates).state)
    assert share == pytest.approx(9 / 10)  # 1.5^2 of 1.5^2 + 0.5^2
    product = 2 * state.factors["layer.b"] @ state.factors["layer.a"]
    assert np.allclose(product, [[1.5, 0.0], [0.0, 0.0]], atol=1e-6)


def test_a_model_of_no_change_has_rows_that_can_be_trained() -> None:
    state, share = global_state(FLEX, STATE)
    assert share == 1.0
    assert not state.factors["layer.b"].any()
    assert state.factors["layer.a"].all()


def test_a_client_that_trained_nothing_changes_nothing() -> None:
    federation = replace(FLEX, method=METHODS["fedit"], exact_changes=None, alpha=lambda rank: 0.3)
    before = METHODS["fedit"].init(BLUEPRINT, FedItSettings(wire_dtype="fp32"))
    start = state_of(np.array([[0.1, 0.7]]), np.array([[1 / 3], [0.9]]))
    moved = replace(before, tensors=start.factors)
    asked = order(federation, moved, "ann", 1)
    content = RecordDict(
        {"arrays": to_record(sent_state(federation, asked)), "metrics": MetricRecord({"num-examples": 1})}
    )
    update = read_reply(federation, asked, content, arrays_key="arrays", examples_key="num-examples")
    assert isinstance(update, ClientUpdate)
    assert not any(array.any() for array in update.lora.tensors.values())


def test_a_client_that_started_alone_changes_all_that_it_replies() -> None:
    flora = METHODS["flora"]
    from fedtune.methods.flora import FloraSettings

    federation = replace(FLEX, method=flora, exact_changes=None)
    state = flora.init(BLUEPRINT, FloraSettings(wire_dtype="fp32"))
    asked = order(federation, state, "ann", 1, starts_alone=True)
    update = read_reply(
        federation, asked, reply([[1, 0]], [[1], [0]]), arrays_key="arrays", examples_key="num-examples"
    )
    assert isinstance(update, ClientUpdate)
    after = combine(federation, state, {"ann": asked}, [update]).state
    assert np.allclose(delta(global_change(federation, after)["layer"]), [[2, 0], [0, 0]])


def test_without_an_update_there_is_no_next_state() -> None:
    with pytest.raises(RoundError, match="expected at least one usable update; got none"):
        combine(FLEX, STATE, {}, [])


def test_the_rank_of_a_reply_is_seen_or_that_of_the_run() -> None:
    assert shown_rank(FLEX, reply([[1, 0], [0, 1]], [[1, 0], [0, 1]]), "arrays") == 2
    assert shown_rank(FLEX, RecordDict(), "arrays") == 1


def test_a_frozen_factor_may_only_be_rounded() -> None:
    start = np.array([[1 / 3, 0.1]], np.float32)
    check_untrained("x.a", start.astype(np.float16).astype(np.float32), start)
    with pytest.raises(WireError, match="x: expected lora_A as it was sent"):
        check_untrained("x.a", start * np.float32(1.001), start)
    with pytest.raises(WireError):
        check_untrained("y.a", start, None)
