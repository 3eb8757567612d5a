"""Orders that outlast rounds over a grid: answers are kept whatever else is looked for, and each is given once."""

from __future__ import annotations

from fedtune.flower.engine import RayTransport
from fedtune.messages import Failure
from fedtune.rounds.transport import LiveTransport, Reply, Rule, UnsolicitedReply
from tests.flower.conftest import NEVER, NODE, Clock, MemoryGrid, client, fleet, orders, over, silent_until


def test_a_grid_transport_is_live_and_rays_is_not(clock: Clock) -> None:
    transport = over(fleet("ann"), clock)
    assert isinstance(transport, LiveTransport)
    assert not isinstance(RayTransport(transport), LiveTransport)


def test_answers_come_one_by_one_and_a_client_is_idle_again(clock: Clock) -> None:
    slow = client("bob", answers=silent_until(clock, 60))
    transport = over(MemoryGrid({NODE: client("ann"), NODE + 1: slow}), clock, expected=2)
    transport.clients()
    assert transport.send(orders("ann", "bob"), 600) == []
    # Ann has answered by now, and her answer waits.
    assert [one.name for one in transport.idle()] == ["ann"]
    first = transport.receive(10)
    assert isinstance(first, Reply)
    assert first.client == "ann"
    assert [one.name for one in transport.idle()] == ["ann"]
    assert transport.receive(10) is None
    assert clock() == 10
    second = transport.receive(600)
    assert isinstance(second, Reply)
    assert second.client == "bob"
    assert 60 <= clock() < 61


def test_an_answer_that_comes_while_scores_are_asked_for_is_kept(clock: Clock) -> None:
    """Between two rounds sites score the model: what others have trained meanwhile must not be dropped as late."""
    slow = client("bob", answers=silent_until(clock, 5))
    transport = over(MemoryGrid({NODE: client("ann"), NODE + 1: slow}), clock, expected=2)
    transport.clients()
    transport.send(orders("bob"), 600)
    (other,) = transport.exchange(orders("ann"), Rule(quorum=1))
    assert other.client == "ann"
    clock.now = 6
    transport.clients()
    kept = transport.receive(0)
    assert isinstance(kept, Reply)
    assert kept.client == "bob"


def test_a_withdrawn_order_is_answered_unasked_and_its_client_is_busy_until_then(clock: Clock) -> None:
    slow = client("bob", answers=silent_until(clock, 30))
    transport = over(MemoryGrid({NODE: client("ann"), NODE + 1: slow}), clock, expected=2)
    transport.clients()
    transport.send(orders("bob"), 600)
    transport.withdraw("bob")
    assert [one.name for one in transport.idle()] == ["ann"]
    late = transport.receive(60)
    assert isinstance(late, UnsolicitedReply)
    assert "after its round had ended" in late.reason
    assert [one.name for one in transport.idle()] == ["ann", "bob"]


def test_an_order_to_a_client_that_has_left_fails_at_once(clock: Clock) -> None:
    grid = fleet("ann", "bob")
    transport = over(grid, clock, expected=2, patience_s=1, hello_s=1)
    transport.clients()
    del grid.nodes[NODE + 1]
    transport.idle()
    (failure,) = transport.send(orders("bob"), 600)
    assert isinstance(failure, Failure)
    assert failure.reason == "left before its assignment was sent"


def test_a_client_that_comes_later_is_idle_without_a_wait(clock: Clock) -> None:
    grid = fleet("ann")
    transport = over(grid, clock)
    transport.clients()
    grid.nodes[NODE + 5] = client("eve")
    before = clock()
    transport.idle()
    assert [one.name for one in transport.idle()] == ["ann", "eve"]
    assert clock() == before


def test_flower_drops_an_order_some_time_after_its_client_was_given_up(clock: Clock) -> None:
    silent = client("bob", answers=silent_until(clock, NEVER))
    transport = over(MemoryGrid({NODE: client("ann"), NODE + 1: silent}), clock, expected=2)
    transport.clients()
    transport.send(orders("bob"), 100)
    transport.withdraw("bob")
    clock.now = 1000
    assert [one.name for one in transport.idle()] == ["ann", "bob"]
