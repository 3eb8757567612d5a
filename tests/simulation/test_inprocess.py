from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np

from fedtune.errors import ClientError
from fedtune.messages import (
    Assignment,
    Client,
    ClientUpdate,
    Failure,
    LoraResult,
    Plan,
    Training,
    TrainLora,
)
from fedtune.rounds.transport import Answer, Reply, Rule, Work
from fedtune.simulation.inprocess import InProcess
from fedtune.wire.codec import EncodedAssignment, blob_encoder, decode_update, encode_assignment

TRAINING = Training(batch=1, learning_rate=0.1, steps=1)
BLOB = {"x.a": np.ones((2, 6), ml_dtypes.bfloat16), "x.b": np.ones((4, 2), ml_dtypes.bfloat16)}


def assignment(name: str) -> Assignment:
    return Assignment(
        "flora", 1, 3, Plan(name, 2, 2.0, TRAINING), TrainLora(a_key=4, blobs={"global": BLOB}), base="base"
    )


def orders(*names: str) -> Mapping[str, EncodedAssignment]:
    encode = blob_encoder()
    return {name: encode_assignment(assignment(name), encode=encode) for name in names}


def echo(received: Assignment) -> ClientUpdate:
    tensors = {name: np.array(tensor) for name, tensor in received.lora.blobs["global"].items()}
    return ClientUpdate(received.plan.client, received.round, 5, LoraResult(tensors, base=received.base))


def exchanged(work: Mapping[str, Work]) -> list[Answer]:
    transport = InProcess([Client(name, 5) for name in work], work)
    return list(transport.exchange(orders(*work), Rule(quorum=1)))


def test_messages_arrive_as_they_were_sent() -> None:
    (reply,) = exchanged({"ann": echo})
    assert isinstance(reply, Reply)
    update = decode_update(reply.update, client="ann", limit_bytes=10_000)
    for name, tensor in BLOB.items():
        np.testing.assert_array_equal(update.lora.tensors[name], tensor)
        assert update.lora.tensors[name].dtype == tensor.dtype


def test_a_clients_error_is_its_own_failure() -> None:
    def fail(received: Assignment) -> ClientUpdate:
        raise ClientError("bob: loss is nan")

    ann, bob = exchanged({"ann": echo, "bob": fail})
    assert isinstance(ann, Reply)
    assert bob == Failure.from_text("bob", "bob: loss is nan")


def test_a_client_cannot_write_into_what_others_receive() -> None:
    def scribble(received: Assignment) -> ClientUpdate:
        assert not received.lora.blobs["global"]["x.a"].flags.writeable
        return echo(received)

    assert all(isinstance(answer, Reply) for answer in exchanged({"ann": scribble, "bob": scribble}))


def test_a_body_that_many_receive_is_decoded_once() -> None:
    seen = []

    def keep(received: Assignment) -> ClientUpdate:
        seen.append(received.lora.blobs["global"])
        return echo(received)

    exchanged({"ann": keep, "bob": keep})
    assert seen[0] is seen[1]


def test_work_is_offered_to_several_clients_at_once_and_answers_keep_their_order() -> None:
    offered = []

    def together(received: Sequence[Assignment]) -> Mapping[str, ClientUpdate]:
        offered.append([item.plan.client for item in received])
        return {item.plan.client: echo(item) for item in received if item.plan.client != "bob"}

    def alone(received: Assignment) -> ClientUpdate:
        raise ClientError(f"{received.plan.client} works alone")

    names = ("cyd", "bob", "ann")
    transport = InProcess([Client(name, 5) for name in names], dict.fromkeys(names, alone), together, at_once=2)
    cyd, bob, ann = transport.exchange(orders(*names), Rule(quorum=1))
    assert offered == [["cyd", "bob"], ["ann"]]
    assert isinstance(cyd, Reply)
    assert bob == Failure.from_text("bob", "bob works alone")
    assert (cyd.client, bob.client, ann.client) == names


def test_a_message_that_cannot_be_read_costs_its_client_alone() -> None:
    names = ("ann", "bob")
    sent = dict(orders(*names))
    sent["ann"] = replace(sent["ann"], header=b"\xff")
    transport = InProcess([Client(name, 5) for name in names], dict.fromkeys(names, echo), at_once=2)
    ann, bob = transport.exchange(sent, Rule(quorum=1))
    assert isinstance(ann, Failure)
    assert isinstance(bob, Reply)
