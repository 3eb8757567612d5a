from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np

from fedtune.errors import ClientError
from fedtune.round import Assignment, Client, ClientUpdate, Failure, LocalAdapter, Plan, Training
from fedtune.simulation.inprocess import InProcess

TRAINING = Training(batch=1, learning_rate=0.1, steps=1)


def assignment(name: str, rank: int = 2) -> Assignment:
    blob = {"x.a": np.ones((rank, 6), ml_dtypes.bfloat16), "x.b": np.ones((4, rank), ml_dtypes.bfloat16)}
    return Assignment("flora", 1, 3, Plan(name, rank, 2.0, TRAINING), LocalAdapter(a_key=4), {"global": blob}, "base")


def echo(received: Assignment) -> ClientUpdate:
    tensors = {name: np.array(tensor) for name, tensor in received.blobs["global"].items()}
    return ClientUpdate(received.plan.client, received.round, 5, tensors, base=received.base)


def test_messages_arrive_as_they_were_sent() -> None:
    transport = InProcess([Client("ann", 5)], {"ann": echo})
    ((outcome, traffic),) = transport.exchange({"ann": assignment("ann")})
    assert isinstance(outcome, ClientUpdate)
    for name, tensor in assignment("ann").blobs["global"].items():
        np.testing.assert_array_equal(outcome.tensors[name], tensor)
        assert outcome.tensors[name].dtype == tensor.dtype
    payload = 2 * (6 + 4) * 2  # rank 2, (6 in + 4 out), two bytes each
    assert payload < traffic.down < payload + 400
    assert payload < traffic.up < payload + 400


def test_bytes_grow_with_the_rank_exactly() -> None:
    transport = InProcess([Client("ann", 5)], {"ann": echo})
    small, large = (next(transport.exchange({"ann": assignment("ann", rank)}))[1] for rank in (10, 20))
    assert 10 * 10 * 2 <= large.down - small.down <= 10 * 10 * 2 + 8


def test_a_clients_error_is_its_own_failure() -> None:
    def fail(received: Assignment) -> ClientUpdate:
        raise ClientError("bob: loss is nan")

    transport = InProcess([Client("ann", 5), Client("bob", 5)], {"ann": echo, "bob": fail})
    outcomes = dict(zip("ab", transport.exchange({n: assignment(n) for n in ("ann", "bob")}), strict=True))
    assert isinstance(outcomes["a"][0], ClientUpdate)
    assert outcomes["b"][0] == Failure("bob", "bob: loss is nan")
    assert outcomes["b"][1].up == 0


def test_an_update_under_another_name_is_a_failure() -> None:
    transport = InProcess([Client("ann", 5)], {"ann": lambda received: replace(echo(received), client="bob")})
    ((outcome, _),) = transport.exchange({"ann": assignment("ann")})
    assert isinstance(outcome, Failure)
    assert outcome.client == "ann"


def test_a_client_cannot_write_into_what_others_receive() -> None:
    def scribble(received: Assignment) -> ClientUpdate:
        assert not received.blobs["global"]["x.a"].flags.writeable
        return echo(received)

    names = ("ann", "bob")
    transport = InProcess([Client(name, 5) for name in names], {name: scribble for name in names})
    assert all(
        isinstance(outcome, ClientUpdate) for outcome, _ in transport.exchange({n: assignment(n) for n in names})
    )
