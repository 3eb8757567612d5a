"""Clients on simulated devices: what they are asked, and when their updates are there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fedtune.messages import AdmittedUpdate, Client, Failure
from fedtune.rounds.asynchronous import AsyncSettings
from fedtune.rounds.context import RoundContext
from fedtune.rounds.journal import OpenOrders
from fedtune.rounds.loop import make_request
from fedtune.rounds.pending import Pending, SimulatedCourier, pending_of
from fedtune.wire.codec import decode_assignment, encode_update
from tests.rounds.scripted import never
from tests.rounds.test_buffer import THREE, Recorded, Steady, context_of, trained

NOTHING = OpenOrders()
FLEET = tuple(Client(name, 10) for name in THREE)


def batch_of(context: RoundContext, now_s: float = 0.0) -> list[Pending]:
    state = context.method.init(context.blueprint, context.settings)
    request = make_request(context, state, context.planner.plan(None, 1, FLEET), FLEET, {})
    return list(pending_of(request, FLEET, state, now_s))


def delivered(context: RoundContext, known: OpenOrders = NOTHING, now_s: float = 0.0) -> dict[str, Pending]:
    assert context.clock is not None
    batch = SimulatedCourier(context, context.clock).deliver(1, batch_of(context, now_s), known)
    return {one.name: one for one in batch}


def test_an_update_is_there_when_the_clock_says_so() -> None:
    context = context_of(THREE, AsyncSettings(buffer=2))
    pending = delivered(context, now_s=5.0)
    assert {name: one.arrives_s for name, one in pending.items()} == {"ann": 6.0, "bob": 7.0, "cyd": 15.0}
    assert all(one.traffic.up and one.traffic.down for one in pending.values())
    courier = SimulatedCourier(context, Steady(THREE))
    first = courier.arrive(1, pending, None)
    assert first is not None
    assert first.name == "ann"
    assert courier.arrive(1, pending, 5.9) is None
    assert courier.arrive(1, pending, 6.0) == first


def test_of_two_at_the_same_time_the_name_decides() -> None:
    pending = delivered(context_of({"ann": 2.0, "bob": 2.0, "cyd": 2.0}, AsyncSettings(buffer=2)))
    reordered = dict(reversed(pending.items()))
    assert SimulatedCourier(context_of(THREE, None), Steady(THREE)).arrive(1, reordered, None) == pending["ann"]


def test_what_the_journal_holds_is_not_asked_for_again() -> None:
    context = context_of(THREE, AsyncSettings(buffer=2))
    order = batch_of(context)[0].request.encoded["ann"]
    update = trained(0.3)(decode_assignment(order.header, order.blobs))
    assert not isinstance(update, Failure | bytes)
    known = OpenOrders(
        updates={"ann": encode_update(update)}, failures={"bob": Failure.from_text("bob", "no power")}, sizes={"bob": 9}
    )
    journal = Recorded()
    pending = delivered(replace(context_of(THREE, None, replies={"ann": never, "bob": never}), journal=journal), known)
    assert isinstance(pending["ann"].outcome, AdmittedUpdate)
    assert str(pending["bob"].outcome) == str(known.failures["bob"])
    assert pending["bob"].traffic.up == 9
    assert journal.steps == [("accept", 1, "cyd")]


def test_a_client_whose_bytes_are_no_update_fails_alone_and_at_once() -> None:
    replies: Any = {"bob": lambda assignment: b"nonsense"}
    pending = delivered(context_of(THREE, AsyncSettings(buffer=2), replies=replies), now_s=5.0)
    assert isinstance(pending["bob"].outcome, Failure)
    assert pending["bob"].arrives_s == 5.0
    assert isinstance(pending["ann"].outcome, AdmittedUpdate)
