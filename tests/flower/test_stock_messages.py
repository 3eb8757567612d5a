from __future__ import annotations

from typing import Any

import numpy as np
from flwr.app import Error, Message, RecordDict

from fedtune.flower import shim
from fedtune.flower.frozen_change import FROZEN, digest
from fedtune.flower.peft_records import from_record
from fedtune.flower.stock_messages import Asked, Keys, arrays_bytes, ask, read_answers
from fedtune.flower.stock_round import Federation
from fedtune.messages import Blueprint
from fedtune.methods import METHODS
from fedtune.methods.fedex import FedExSettings
from fedtune.methods.flora import FloraSettings
from tests.flower.conftest import NODE

KEYS = Keys("arrays", "config", "num-examples")
BLUEPRINT = Blueprint({"layer": (4, 6)}, {"score.weight": np.ones((2, 3), np.float32)}, max_rank=2, seed=0)


def asked_of(method: str, settings: Any, **clients: int) -> dict[str, Asked]:
    federation = Federation(METHODS[method], BLUEPRINT, "", rank=2, alpha=lambda rank: 4.0, sends_frozen=True)
    state = METHODS[method].init(BLUEPRINT, settings)
    nodes = {name: (NODE + place, rank) for place, (name, rank) in enumerate(clients.items())}
    return dict(ask(federation, state, nodes, "train", {"lr": 0.5}, KEYS))


def test_a_client_is_sent_factors_of_its_rank_and_what_its_model_is_built_from() -> None:
    asked = asked_of("flora", FloraSettings(wire_dtype="fp32"), ann=1, bob=2)
    state = from_record(asked["ann"].message.content.array_records["arrays"])
    assert (state.ranks, sorted(state.saved)) == ({"layer": 1}, ["score.weight"])
    assert asked["bob"].message.content.config_records["config"] == {"lr": 0.5, "lora-rank": 2, "lora-alpha": 4.0}
    assert asked["bob"].message.metadata.dst_node_id == NODE + 1


def test_a_client_of_unknown_rank_is_sent_modules_to_save_alone() -> None:
    asked = asked_of("flora", FloraSettings(wire_dtype="fp32"), ann=0)
    state = from_record(asked["ann"].message.content.array_records["arrays"])
    assert asked["ann"].order is None
    assert (dict(state.ranks), sorted(state.saved)) == ({}, ["score.weight"])
    assert "lora-rank" not in asked["ann"].message.content.config_records["config"]


def test_clients_share_records_where_they_are_sent_the_same_numbers() -> None:
    shared = asked_of("fedex", FedExSettings(wire_dtype="fp32"), ann=2, bob=2)
    assert shared["ann"].message.content["arrays"] is shared["bob"].message.content["arrays"]
    # Fresh rows of A are each client's own.
    fresh = asked_of("flora", FloraSettings(wire_dtype="fp32"), ann=2, bob=2)
    one, other = (from_record(fresh[name].message.content.array_records["arrays"]) for name in ("ann", "bob"))
    assert not np.array_equal(one.factors["layer.a"], other.factors["layer.a"])


def test_the_digest_of_a_frozen_change_is_noted() -> None:
    federation = Federation(METHODS["fedex"], BLUEPRINT, "", rank=2, alpha=lambda rank: 4.0, sends_frozen=True)
    from fedtune.lora import lowrank
    from fedtune.lora.adapter import Factors

    state = METHODS["fedex"].init(BLUEPRINT, FedExSettings(wire_dtype="fp32"))
    rest = lowrank.compress({"layer": Factors(a=np.ones((1, 6), np.float32), b=np.ones((4, 1), np.float32))})
    from dataclasses import replace

    state = replace(state, residual=lowrank.pack(rest))
    asked = ask(federation, state, {"ann": (NODE, 2)}, "train", {}, KEYS)["ann"]
    assert asked.order is not None
    assert asked.order.frozen_digest == digest(asked.message.content.array_records[FROZEN])


def test_replies_are_matched_by_message_and_sorted_by_name() -> None:
    asked = asked_of("flora", FloraSettings(wire_dtype="fp32"), eve=1, bob=1, ann=1, zoe=1)
    for place, one in enumerate(asked.values()):
        shim.stamp(one.message, f"m{place}")
    replies = [
        Message(RecordDict(), reply_to=asked["eve"].message),
        Message(Error(2, "no rows"), reply_to=asked["bob"].message),
        Message(RecordDict(), reply_to=asked["ann"].message),
        Message(Error(2, "again"), reply_to=asked["ann"].message),
    ]
    contents, failures = read_answers(asked, replies)
    assert list(contents) == ["ann", "eve"]
    assert {failure.client: failure.reason for failure in failures} == {
        "bob": "Flower error 2: no rows",
        "zoe": "expected a reply in time; got none",
    }


def test_bytes_are_those_of_arrays_alone() -> None:
    asked = asked_of("flora", FloraSettings(wire_dtype="fp32"), ann=0)["ann"]
    assert asked.num_bytes == arrays_bytes(asked.message.content) == 128 + 24
