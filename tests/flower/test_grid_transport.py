from __future__ import annotations

from dataclasses import replace
from gc import collect
from weakref import ReferenceType, ref

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict

from fedtune.errors import RoundError
from fedtune.flower.grid_transport import HELLO, GridTransport
from fedtune.flower.records import ERROR, HEADER, TENSORS, pack, unpack
from fedtune.flower.shim import stamp
from fedtune.messages import Client, ClientUpdate, Failure
from fedtune.rounds.transport import Answer, Reply, Rule, UnsolicitedReply
from fedtune.wire.codec import decode_update
from fedtune.wire.profile import ModelSpec, decode_terms
from tests.flower.conftest import (
    FOUNDATION,
    NEVER,
    NODE,
    Clock,
    MemoryGrid,
    Node,
    client,
    fleet,
    greeting,
    orders,
    over,
    profile,
    silent_until,
)

ALL = Rule(quorum=1)


def names(transport: GridTransport) -> list[str]:
    return [one.name for one in transport.clients()]


def exchanged(transport: GridTransport, *clients: str, rule: Rule = ALL) -> dict[str, Answer]:
    answers = list(transport.exchange(orders(*clients), rule))
    assert len({answer.client for answer in answers}) == len(answers)
    return {answer.client: answer for answer in answers}


def update(answer: Answer) -> ClientUpdate:
    assert isinstance(answer, Reply), answer
    return decode_update(answer.update, client=answer.client, limit_bytes=1 << 20)


def test_clients_are_known_by_the_names_that_they_say(clock: Clock) -> None:
    assert over(fleet("cyd", "ann", "bob"), clock, expected=3).clients() == [
        Client("ann", 10),
        Client("bob", 10),
        Client("cyd", 10),
    ]


def test_a_rosters_organisations_are_those_of_the_clients(clock: Clock) -> None:
    organisations = {"ann": "north", "bob": "south"}
    transport = over(
        fleet("bob", "ann", "cyd"), clock, expected=3, organisation=lambda name: organisations.get(name, "")
    )
    assert [(client.name, client.organisation) for client in transport.clients()] == [
        ("ann", "north"),
        ("bob", "south"),
        ("cyd", ""),
    ]


def test_every_client_answers_its_own_order(clock: Clock) -> None:
    transport = over(fleet("ann", "bob"), clock, expected=2)
    transport.clients()
    answers = exchanged(transport, "ann", "bob")
    assert {name: update(answer).client for name, answer in answers.items()} == {"ann": "ann", "bob": "bob"}


def test_a_client_says_hello_once(clock: Clock) -> None:
    grid = fleet("ann", "bob")
    transport = over(grid, clock, expected=2)
    for _ in range(3):
        transport.clients()
        exchanged(transport, "ann", "bob")
    assert [kind for _, kind in grid.pushed].count(HELLO) == 2
    assert [kind for _, kind in grid.pushed].count(MessageType.TRAIN) == 6


def test_names_hold_under_other_node_ids_and_any_order_of_replies(clock: Clock) -> None:
    def answers(grid: MemoryGrid) -> dict[str, bytes]:
        transport = over(grid, clock, expected=3)
        transport.clients()
        found = exchanged(transport, "ann", "bob", "cyd")
        return {name: answer.update for name, answer in sorted(found.items()) if isinstance(answer, Reply)}

    shuffled = MemoryGrid({2**63 - 1 - i: client(name) for i, name in enumerate(("bob", "cyd", "ann"))})
    shuffled.order = lambda replies: replies[::-1]
    assert answers(shuffled) == answers(fleet("ann", "bob", "cyd"))
    assert float(NODE + 1) == float(NODE)  # what the test is about: such ids do not survive a float


def test_a_reply_counts_for_the_order_that_it_names_whatever_its_source(clock: Clock) -> None:
    grid = fleet("ann", "bob")

    def swapped(replies: list[Message]) -> list[Message]:
        for reply in replies:
            reply.metadata.__dict__["_src_node_id"] = 1  # the server's own, as in Flower's error replies
        return replies

    grid.order = swapped  # type: ignore[assignment]
    transport = over(grid, clock, expected=2)
    transport.clients()
    assert {update(answer).client for answer in exchanged(transport, "ann", "bob").values()} == {"ann", "bob"}


def test_a_reply_to_nothing_is_left_alone(clock: Clock) -> None:
    grid = fleet("ann")

    def stray(replies: list[Message]) -> list[Message]:
        order = Message(RecordDict(), NODE, MessageType.TRAIN)
        stamp(order, "never-sent")
        return [Message(RecordDict(), reply_to=order), *replies]

    grid.order = stray  # type: ignore[assignment]
    transport = over(grid, clock)
    assert names(transport) == ["ann"]
    assert list(exchanged(transport, "ann")) == ["ann"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Error(5, "node is unavailable"), "Flower error 5: node is unavailable"),
        (Error(2, None), "Flower error 2: no reason given"),
        (Error(ERROR, "ann: loss is nan"), "ann: loss is nan"),
    ],
)
def test_an_error_reply_costs_one_client_its_update(error: Error, reason: str, clock: Clock) -> None:
    def failing(message: Message) -> RecordDict | Error:
        return greeting(profile("ann")) if message.metadata.message_type == HELLO else error

    transport = over(fleet("ann", "bob", ann=failing), clock, expected=2)
    transport.clients()
    answers = exchanged(transport, "ann", "bob")
    assert answers["ann"] == Failure.from_text("ann", reason)
    assert isinstance(answers["bob"], Reply)


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({HEADER: ConfigRecord({"proto": b""}), TENSORS: ArrayRecord()}),
        pack(b"", {"update": b"x", "more": b"y"}),
    ],
)
def test_an_answer_of_another_layout_is_refused(content: RecordDict, clock: Clock) -> None:
    def odd(message: Message) -> RecordDict:
        return greeting(profile("ann")) if message.metadata.message_type == HELLO else content

    transport = over(fleet("ann", ann=odd), clock)
    transport.clients()
    answer = exchanged(transport, "ann")["ann"]
    assert isinstance(answer, Failure)
    assert answer.kind == "refused"


@pytest.mark.parametrize("instead", [[], [None], [""]])
def test_an_order_that_is_not_accepted_is_a_failure(instead: list[str | None], clock: Clock) -> None:
    grid = fleet("ann", "bob")
    transport = over(grid, clock, expected=2)
    transport.clients()
    grid.refuse = lambda message: instead if message.metadata.dst_node_id == NODE else None
    answers = exchanged(transport, "ann", "bob")
    assert answers["ann"] == Failure.from_text("ann", "its assignment was not accepted for delivery")
    assert isinstance(answers["bob"], Reply)
    grid.refuse = lambda message: None
    assert names(transport) == ["ann", "bob"]  # and is not busy with what it never got


@pytest.mark.guarantee("G14")
def test_a_resumed_round_waits_for_no_client_that_may_not_come_and_a_while_for_others(clock: Clock) -> None:
    """It waited for `patience_s`, seven days over the link, for a site that was revoked or had gone for good."""
    gone = Failure.from_text("cid", "left before its assignment was sent")
    for may_come, waited_s in ((lambda name: name != "cid", 0), (lambda name: True, 20)):
        began, grid = clock.now, fleet("ann", "bob")
        transport = over(grid, clock, expected=2, patience_s=10**6, hello_s=20, may_come=may_come)
        answers = exchanged(transport, "ann", "bob", "cid", rule=Rule(quorum=2))
        assert isinstance(answers["ann"], Reply)
        assert isinstance(answers["bob"], Reply)
        assert answers["cid"] == gone
        assert waited_s <= clock.now - began < waited_s + 15
    began = clock.now
    transport = over(fleet("ann"), clock, expected=2, patience_s=1000, hello_s=20)
    exchanged(transport, "ann", "bob", "cid", rule=Rule(quorum=2))
    assert clock.now - began >= 1000  # too few are here: the others may come yet


def test_a_client_that_has_left_is_a_failure_at_once(clock: Clock) -> None:
    grid = fleet("ann", "bob")
    transport = over(grid, clock, expected=2, patience_s=30)
    transport.clients()
    del grid.nodes[NODE]
    assert names(transport) == ["bob"]
    assert exchanged(transport, "ann", "bob")["ann"] == Failure.from_text("ann", "left before its assignment was sent")


def test_a_round_that_goes_on_greets_its_cohort_first(clock: Clock) -> None:
    transport = over(fleet("ann", "bob"), clock, expected=2)
    assert all(isinstance(answer, Reply) for answer in exchanged(transport, "ann", "bob").values())


def late(name: str, clock: Clock, seconds: float) -> Node:
    return client(name, answers=silent_until(clock, seconds))


def test_a_round_ends_when_all_have_answered(clock: Clock) -> None:
    transport = over(fleet("ann", "bob", bob=late("bob", clock, 20)), clock, expected=2)
    transport.clients()
    answers = exchanged(transport, "ann", "bob", rule=Rule(quorum=1, deadline_s=60))
    assert isinstance(answers["bob"], Reply)
    assert 20 <= clock() < 21


def test_a_round_with_a_quorum_ends_at_its_deadline(clock: Clock) -> None:
    transport = over(fleet("ann", "bob", bob=late("bob", clock, NEVER)), clock, expected=2)
    transport.clients()
    answers = exchanged(transport, "ann", "bob", rule=Rule(quorum=1, deadline_s=60, grace_s=30))
    assert isinstance(answers["ann"], Reply)
    assert answers["bob"] == Failure.from_text("bob", "no answer in 60 s", kind="late")
    assert 60 <= clock() < 61


def test_a_round_without_a_quorum_waits_for_its_grace_too(clock: Clock) -> None:
    transport = over(fleet("ann", "bob", bob=late("bob", clock, NEVER)), clock, expected=2)
    transport.clients()
    answers = exchanged(transport, "ann", "bob", rule=Rule(quorum=2, deadline_s=60, grace_s=30))
    assert answers["bob"] == Failure.from_text("bob", "no answer in 90 s", kind="late")
    assert 90 <= clock() < 91


def test_a_quorum_that_comes_within_the_grace_ends_the_round(clock: Clock) -> None:
    grid = fleet("ann", "bob", "cyd", bob=late("bob", clock, 70), cyd=late("cyd", clock, NEVER))
    transport = over(grid, clock, expected=3)
    transport.clients()
    answers = exchanged(transport, "ann", "bob", "cyd", rule=Rule(quorum=2, deadline_s=60, grace_s=30))
    assert isinstance(answers["bob"], Reply)
    assert isinstance(answers["cyd"], Failure)
    assert 70 <= clock() < 71


def test_an_error_does_not_count_for_the_quorum(clock: Clock) -> None:
    def failing(message: Message) -> RecordDict | Error:
        return greeting(profile("ann")) if message.metadata.message_type == HELLO else Error(2, "no")

    transport = over(fleet("ann", "bob", ann=failing, bob=late("bob", clock, 80)), clock, expected=2)
    transport.clients()
    answers = exchanged(transport, "ann", "bob", rule=Rule(quorum=1, deadline_s=60, grace_s=30))
    assert isinstance(answers["bob"], Reply)


def test_a_round_without_a_deadline_waits_for_everybody(clock: Clock) -> None:
    transport = over(fleet("ann", ann=late("ann", clock, 100_000)), clock)
    transport.clients()
    assert isinstance(exchanged(transport, "ann")["ann"], Reply)


@pytest.mark.guarantee("G14")
def test_a_round_without_a_deadline_of_its_own_ends_at_that_of_networks(clock: Clock) -> None:
    fleet_of_two = fleet("ann", "bob", bob=late("bob", clock, 1000))
    transport = over(fleet_of_two, clock, expected=2, deadline_s=100.0)
    transport.clients()
    answers = exchanged(transport, "ann", "bob", rule=Rule(quorum=1))
    assert isinstance(answers["ann"], Reply)
    assert answers["bob"] == Failure("bob", got="no answer in 100 s", kind="late")
    assert [client.name for client in transport.clients()] == ["ann"]  # bob is not asked while it owes an answer


def test_looks_for_replies_become_rarer_while_nothing_comes(clock: Clock) -> None:
    transport = over(fleet("ann", ann=late("ann", clock, 100)), clock)
    transport.clients()
    exchanged(transport, "ann")
    assert clock.slept[-100:] == [0.5] * 100
    assert sum(clock.slept[:5]) < 0.5


def test_a_late_answer_is_counted_named_and_dropped(clock: Clock) -> None:
    transport = over(fleet("ann", "bob", bob=late("bob", clock, 65)), clock, expected=2)
    rule = Rule(quorum=1, deadline_s=60, grace_s=0)
    transport.clients()
    first = exchanged(transport, "ann", "bob", rule=rule)
    assert isinstance(first["bob"], Failure)
    assert names(transport) == ["ann"]  # bob is busy
    clock.now = 70
    second = exchanged(transport, "ann", rule=rule)
    stray = second["bob"]
    assert isinstance(stray, UnsolicitedReply)
    assert stray.reason == "answered after its round had ended; dropped"
    reply = second["ann"]
    assert isinstance(reply, Reply)
    assert stray.num_bytes == len(reply.update)
    assert names(transport) == ["ann", "bob"]
    assert isinstance(exchanged(transport, "ann", "bob", rule=rule)["bob"], Reply)


def test_a_late_answer_that_comes_between_rounds_is_told_in_the_next(clock: Clock) -> None:
    transport = over(fleet("ann", "bob", bob=late("bob", clock, 65)), clock, expected=2)
    rule = Rule(quorum=1, deadline_s=60, grace_s=0)
    transport.clients()
    exchanged(transport, "ann", "bob", rule=rule)
    clock.now = 70
    assert names(transport) == ["ann", "bob"]
    found = list(transport.exchange(orders("ann"), rule))
    assert [type(answer) for answer in found] == [UnsolicitedReply, Reply] or [type(a) for a in found] == [
        Reply,
        UnsolicitedReply,
    ]


def test_a_client_is_free_again_when_flower_has_dropped_its_order(clock: Clock) -> None:
    transport = over(fleet("ann", "bob", bob=late("bob", clock, NEVER)), clock, expected=2)
    transport.clients()
    exchanged(transport, "ann", "bob", rule=Rule(quorum=1, deadline_s=60, grace_s=10))
    assert names(transport) == ["ann"]
    clock.now = 60 + 10 + 60 + 60 + 1  # deadline, grace, and twice the minute in which an answer still counts
    assert names(transport) == ["ann", "bob"]


def test_a_round_waits_for_the_clients_that_it_needs(clock: Clock) -> None:
    transport = over(fleet("ann", "bob", bob=late("bob", clock, 100)), clock, expected=2, least=2)
    transport.clients()
    exchanged(transport, "ann", "bob", rule=Rule(quorum=1, deadline_s=60, grace_s=0))
    assert names(transport) == ["ann", "bob"]
    assert 100 <= clock() < 101


def test_the_first_round_waits_for_the_clients_that_are_expected(clock: Clock) -> None:
    grid = fleet("ann")
    transport = over(grid, clock, expected=2)

    def joined(message: Message) -> RecordDict | Error | None:
        if clock() > 30:
            grid.nodes[NODE + 1] = client("bob")
        return client("ann")(message)

    grid.nodes[NODE] = joined
    original = grid.get_nodes

    def nodes() -> object:
        if clock() > 30:
            grid.nodes[NODE + 1] = client("bob")
        return original()

    grid.get_nodes = nodes  # type: ignore[assignment, method-assign]
    assert names(transport) == ["ann", "bob"]
    assert 30 < clock() < 32


def test_clients_that_do_not_come_are_an_error_that_names_those_who_did(clock: Clock) -> None:
    transport = over(fleet("ann", "bob"), clock, expected=3, patience_s=60)
    with pytest.raises(RoundError, match=r"expected at least 3 clients.*after 60 s ann, bob had said hello"):
        transport.clients()
    with pytest.raises(RoundError, match="none had said hello"):
        over(MemoryGrid({}), clock, patience_s=60).clients()


def test_a_hello_that_never_comes_holds_the_others_up_for_its_time_alone(clock: Clock) -> None:
    grid = fleet("ann", "bob", bob=client("bob", answers=silent_until(clock, NEVER, kind=HELLO)))
    transport = over(grid, clock)
    assert names(transport) == ["ann"]
    assert 300 <= clock() < 301
    assert names(transport) == ["ann"]
    assert 300 <= clock() < 301
    assert grid.pushed.count((NODE + 1, HELLO)) == 1


@pytest.mark.guarantee("G14")
def test_a_client_that_comes_again_and_again_and_never_answers_holds_no_round_up(clock: Clock) -> None:
    """Bound to its key by a name; each time that it comes it is another node, with a hello of its own."""
    silent = client("bob", answers=silent_until(clock, NEVER, kind=HELLO))
    grid = fleet("ann")
    grid.names = {NODE: "ann"} | {NODE + number: "bob" for number in range(1, 5)}
    transport = over(grid, clock)
    assert names(transport) == ["ann"]
    for number in range(1, 5):
        grid.nodes = {NODE: grid.nodes[NODE], NODE + number: silent}
        assert names(transport) == ["ann"]
    assert clock() == 0
    assert grid.pushed.count((NODE + 4, HELLO)) == 1


@pytest.mark.guarantee("G14")
def test_a_client_that_took_part_is_waited_for_when_it_comes_again_but_not_for_ever(clock: Clock) -> None:
    grid = fleet("ann", "bob")
    grid.names = {NODE: "ann"} | {NODE + number: "bob" for number in range(1, 9)}
    transport = over(grid, clock)
    assert names(transport) == ["ann", "bob"]
    back = client("bob", answers=silent_until(clock, 40, kind=HELLO))  # it loads its base
    grid.nodes = {NODE: grid.nodes[NODE], NODE + 2: back}
    assert names(transport) == ["ann", "bob"]
    assert 40 <= clock() < 41
    silent = client("bob", answers=silent_until(clock, NEVER, kind=HELLO))
    for number in range(3, 9):
        grid.nodes = {NODE: grid.nodes[NODE], NODE + number: silent}
        assert names(transport) == ["ann"]
        clock.now += 700  # Flower has dropped the message
    assert clock() < 6 * 700 + 302  # 300 s of waiting in all


def test_a_hello_that_comes_late_is_welcome(clock: Clock) -> None:
    grid = fleet("ann", "bob", bob=client("bob", answers=silent_until(clock, 320, kind=HELLO)))
    transport = over(grid, clock)
    assert names(transport) == ["ann"]
    clock.now = 330
    assert names(transport) == ["ann", "bob"]


def told(transport: GridTransport) -> dict[str, str]:
    """Return the notes that the next exchange brings, by client."""
    found = transport.exchange(orders(*names(transport)[:1]), ALL)
    return {answer.client: answer.reason for answer in found if isinstance(answer, UnsolicitedReply)}


def test_of_two_clients_of_one_name_the_first_stays(clock: Clock) -> None:
    transport = over(MemoryGrid({NODE: client("ann"), NODE + 1: client("ann")}), clock)
    assert names(transport) == ["ann"]
    assert told(transport)["ann"].startswith("refused: another connected client has this name")


def test_a_name_is_free_again_when_its_client_has_gone(clock: Clock) -> None:
    grid = fleet("ann")
    transport = over(grid, clock)
    transport.clients()
    grid.nodes = {NODE + 9: client("ann")}
    assert names(transport) == ["ann"]
    assert isinstance(exchanged(transport, "ann")["ann"], Reply)


def test_a_name_that_is_not_the_keys_is_refused(clock: Clock) -> None:
    grid = MemoryGrid({NODE: client("ann"), NODE + 1: client("bob")}, names={NODE: "ann", NODE + 1: "cyd"})
    transport = over(grid, clock)
    assert names(transport) == ["ann"]
    assert "expected the name 'cyd'" in told(transport)["cyd"]


def test_a_client_over_another_base_is_refused_by_name(clock: Clock) -> None:
    other = client("ann", foundation=replace(FOUNDATION, base="77" * 32))
    transport = over(fleet("ann", "bob", "cyd", ann=other), clock, expected=2, base=FOUNDATION.base)
    assert names(transport) == ["bob", "cyd"]
    assert transport.foundation == FOUNDATION
    assert "expected the base 9f3c9f3c9f3c; got 777777777777" in told(transport)["ann"]


def test_without_a_pinned_base_the_first_client_decides_and_no_majority(clock: Clock) -> None:
    other, pinned = client("ann", foundation=replace(FOUNDATION, base="77" * 32)), list[str]()
    transport = over(fleet("ann", "bob", "cyd", ann=other), clock, on_base=pinned.append)
    assert names(transport) == ["ann"]
    assert pinned == ["77" * 32]
    assert sorted(told(transport)) == ["bob", "cyd"]


def classifier(name: str, *own: str) -> Node:
    """Return a client whose data have these classes, and which takes those that its hello names."""

    def node(message: Message) -> RecordDict | Error:
        if message.metadata.message_type != HELLO:
            return client(name)(message)  # type: ignore[return-value]
        asked = decode_terms(unpack(message.content).header)
        if asked and not set(own) <= set(asked):
            return Error(ERROR, f"data.labels: expected {', '.join(asked)}; got {', '.join(own)}")
        return greeting(profile(name, foundation=replace(FOUNDATION, labels=asked or own)))

    return node


def test_classes_are_the_union_over_the_sites_and_a_site_that_lacks_one_takes_part(clock: Clock) -> None:
    nodes = {
        NODE: classifier("ann", "yes"),
        NODE + 1: classifier("bob", "no", "yes"),
        NODE + 2: classifier("cyd", "odd"),
    }
    grid = MemoryGrid(nodes)
    transport = over(grid, clock, expected=3)
    assert not transport.labels
    assert names(transport) == ["ann", "bob", "cyd"]
    assert transport.labels == ("no", "odd", "yes") == transport.foundation.labels
    assert {one.foundation.labels for one in transport.profiles.values()} == {("no", "odd", "yes")}
    grid.nodes |= {NODE + 3: classifier("dan", "odd"), NODE + 4: classifier("eve", "new")}
    assert names(transport) == ["ann", "bob", "cyd", "dan"]
    assert "expected no, odd, yes; got new" in " ".join(told(transport).values())


def test_classes_that_the_recipe_names_are_asked_for_at_once(clock: Clock) -> None:
    nodes = {NODE: classifier("ann", "yes"), NODE + 1: classifier("bob", "maybe")}
    transport = over(MemoryGrid(nodes), clock, labels=("yes", "no"))
    assert names(transport) == ["ann"]
    assert transport.foundation.labels == ("yes", "no")
    assert "got maybe" in " ".join(told(transport).values())


def test_a_client_that_does_not_take_the_classes_of_all_is_refused(clock: Clock) -> None:
    stubborn = client("ann", foundation=replace(FOUNDATION, labels=("yes",)))
    grid = MemoryGrid({NODE: stubborn, NODE + 1: classifier("bob", "no", "yes")})
    with pytest.raises(RoundError, match=r"expected the classes no, yes \(2\); got yes \(1\); run the release"):
        over(grid, clock, expected=2, patience_s=10).clients()


def test_who_takes_part_and_who_does_not_is_reported_with_the_reason(clock: Clock) -> None:
    other, story = client("ann", foundation=replace(FOUNDATION, base="77" * 32)), list[tuple[object, ...]]()
    grid = fleet("ann", "bob", "cyd", "dan", ann=other, dan=lambda message: Error(ERROR, "no such file"))
    GridTransport(
        grid,
        expected=2,
        base=FOUNDATION.base,
        on_admitted=lambda *facts: story.append(facts),
        on_refused=lambda *facts: story.append(facts),
        clock=clock,
        sleep=clock.sleep,
    ).clients()
    refused = {str(name): (str(reason)[:17], final) for name, reason, final in (one for one in story if len(one) == 3)}
    assert refused == {"ann": ("expected the base", True), "": ("no such file", False)}
    assert {one[0] for one in story if len(one) == 2} >= {"bob", "cyd"}


def test_a_client_that_joins_later_must_fit_what_was_settled(clock: Clock) -> None:
    grid = fleet("ann")
    transport = over(grid, clock)
    transport.clients()
    grid.nodes |= {NODE + i: client(f"bob-{i}", foundation=replace(FOUNDATION, base="77" * 32)) for i in (1, 2, 3)}
    assert names(transport) == ["ann"]
    assert sorted(told(transport)) == ["bob-1", "bob-2", "bob-3"]


def test_refused_clients_are_named_when_too_few_are_left(clock: Clock) -> None:
    grid = fleet("ann", "bob", bob=client("bob", foundation=replace(FOUNDATION, base="77" * 32)))
    with pytest.raises(RoundError, match="bob refused: expected the base"):
        over(grid, clock, expected=2, patience_s=10).clients()


def test_where_nobody_else_can_join_a_refused_client_is_not_waited_for(clock: Clock) -> None:
    grid = fleet("ann", "bob", bob=lambda message: Error(ERROR, "no such file"))
    transport = GridTransport(grid, expected=2, closed=True, clock=clock, sleep=clock.sleep)
    with pytest.raises(RoundError, match=r"after 0 s ann had said hello.*refused: no such file"):
        transport.clients()


def test_what_there_is_to_tell_is_told_without_an_order_too(clock: Clock) -> None:
    transport = over(MemoryGrid({NODE: client("ann"), NODE + 1: client("ann")}), clock)
    transport.clients()
    assert [type(answer) for answer in transport.exchange({}, ALL)] == [UnsolicitedReply]


def test_orders_share_what_flower_has_hashed(clock: Clock) -> None:
    grid, sent = fleet("ann", "bob"), list[object]()
    transport = over(grid, clock, expected=2)
    transport.clients()

    def noted(message: Message) -> None:
        sent.extend(message.content.array_records[TENSORS].values())

    grid.refuse = noted
    exchanged(transport, "ann", "bob")
    assert len(sent) == 2
    assert sent[0] is sent[1]


def test_a_hello_that_cannot_be_read_or_fails_is_refused(clock: Clock) -> None:
    grid = fleet(
        "ann", "bob", "cyd", bob=lambda message: Error(ERROR, "no such file"), cyd=lambda message: pack(b"\xff", {})
    )
    transport = over(grid, clock)
    assert names(transport) == ["ann"]
    reasons = [answer for answer in transport.exchange(orders("ann"), ALL) if isinstance(answer, UnsolicitedReply)]
    assert [late.client for late in reasons] == ["unnamed client"] * 2
    assert "refused: no such file" in {late.reason for late in reasons}


def test_a_refused_client_that_starts_again_is_asked_again(clock: Clock) -> None:
    grid = fleet("ann", "bob", bob=lambda message: Error(ERROR, "no such file"))
    transport = over(grid, clock)
    transport.clients()
    del grid.nodes[NODE + 1]
    transport.clients()
    grid.nodes[NODE + 1] = client("bob")
    assert names(transport) == ["ann", "bob"]


def test_what_clients_have_said_can_be_read(clock: Clock) -> None:
    transport = over(fleet("bob", "ann"), clock, expected=2)
    assert transport.foundation.base == FOUNDATION.base
    assert list(transport.profiles) == ["ann", "bob"]


def test_many_clients_are_served_in_windows(clock: Clock) -> None:
    many = [f"client-{number:03d}" for number in range(100)]
    grid = fleet(*many)
    asked: list[int] = []
    pull = grid.pull_messages

    def counted(message_ids: list[str]) -> object:
        asked.append(len(message_ids))
        return pull(message_ids)

    grid.pull_messages = counted  # type: ignore[assignment, method-assign]
    transport = over(grid, clock, expected=100)
    assert len(transport.clients()) == 100
    assert set(exchanged(transport, *many)) == set(many)
    assert max(asked) <= 16


def test_clients_that_are_silent_do_not_hide_one_that_answers(clock: Clock) -> None:
    quiet = [f"client-{number:02d}" for number in range(20)]
    grid = fleet(*quiet, "zoe", **{name: late(name, clock, NEVER) for name in quiet})
    transport = over(grid, clock, expected=21)
    transport.clients()
    assert isinstance(exchanged(transport, *quiet, "zoe", rule=Rule(quorum=1, deadline_s=10))["zoe"], Reply)


@pytest.mark.parametrize(
    ("rule", "seconds"),
    [(Rule(quorum=1, deadline_s=60, grace_s=30), 60 + 30 + 60), (Rule(quorum=1), 7 * 24 * 3600)],
)
def test_flower_keeps_an_order_for_longer_than_its_round_can_last(rule: Rule, seconds: float, clock: Clock) -> None:
    """Otherwise its own error would come before the deadline, and a late answer never."""
    grid, kept = fleet("ann"), list[float]()
    transport = over(grid, clock)
    transport.clients()

    def noted(message: Message) -> None:
        kept.append(message.metadata.ttl)

    grid.refuse = noted
    exchanged(transport, "ann", rule=rule)
    assert kept == [seconds]


def test_a_client_that_restarts_under_another_node_is_back_when_the_dead_one_has_gone(clock: Clock) -> None:
    grid = fleet("ann", "bob")
    transport = over(grid, clock, expected=2)
    transport.clients()
    grid.nodes[NODE] = lambda message: None  # dead, and still listed
    grid.nodes[NODE + 9] = client("ann")
    assert isinstance(exchanged(transport, "bob")["bob"], Reply)
    transport.clients()
    (refused,) = transport.exchange({}, ALL)
    assert isinstance(refused, UnsolicitedReply)
    assert "another connected client has this name" in refused.reason
    del grid.nodes[NODE]
    clock.now += 1
    assert names(transport) == ["ann", "bob"]
    assert isinstance(exchanged(transport, "ann")["ann"], Reply)


def test_a_hello_that_flower_could_not_deliver_is_repeated_after_a_minute(clock: Clock) -> None:
    def node(message: Message) -> RecordDict | Error | None:
        return client("bob")(message) if clock() >= 10 else Error(5, "node is unavailable")

    grid = fleet("ann", "bob", bob=node)
    transport = over(grid, clock)
    assert names(transport) == ["ann"]
    clock.now = 59
    assert names(transport) == ["ann"]
    assert grid.pushed.count((NODE + 1, HELLO)) == 1
    clock.now = 60
    assert names(transport) == ["ann", "bob"]


def test_a_hello_that_was_not_accepted_is_repeated_after_a_minute(clock: Clock) -> None:
    grid = fleet("ann", "bob")
    grid.refuse = lambda message: [] if message.metadata.dst_node_id == NODE + 1 and clock() < 10 else None
    transport = over(grid, clock)
    assert names(transport) == ["ann"]
    clock.now = 60
    assert names(transport) == ["ann", "bob"]


def test_a_client_that_keeps_failing_is_asked_each_minute_told_once_and_holds_nobody_up(clock: Clock) -> None:
    def node(message: Message) -> RecordDict | Error | None:
        return Error(ERROR, "no such file") if clock() in (0, 60, 120) else None

    grid = fleet("ann", "bob", bob=node)
    transport = over(grid, clock)
    reasons = []
    for clock.now in (0, 60, 120, 180):
        assert names(transport) == ["ann"]
        reasons += [a.reason for a in transport.exchange(orders("ann"), ALL) if isinstance(a, UnsolicitedReply)]
    assert reasons == ["refused: no such file"]
    assert grid.pushed.count((NODE + 1, HELLO)) == 4
    assert clock() == 180  # though the last of its hellos is open


@pytest.mark.parametrize(
    "node",
    [
        client("bob", foundation=replace(FOUNDATION, base="77" * 32)),
        client("ann"),
        lambda message: pack(b"\xff", {}),
    ],
    ids=["another base", "not the name of its key", "malformed"],
)
def test_what_another_hello_would_not_change_is_refused_for_the_whole_run(node: Node, clock: Clock) -> None:
    grid = fleet("ann", "bob", bob=node)
    grid.names = {NODE: "ann", NODE + 1: "bob"}
    transport = over(grid, clock)
    transport.clients()
    for clock.now in (0, 100, 1000):
        assert names(transport) == ["ann"]
    assert grid.pushed.count((NODE + 1, HELLO)) == 1


def test_clients_that_agree_share_their_initial_values(clock: Clock) -> None:
    def saying(name: str, number: float) -> Node:
        saved = {"score.weight": np.full((2, 4), number, np.float32)}
        return client(name, foundation=replace(FOUNDATION, saved=saved, saved_modules=("score",)))

    grid = fleet("ann", "bob", "cyd", ann=saying("ann", 1), bob=saying("bob", 1), cyd=saying("cyd", 2))
    transport = over(grid, clock, expected=2)
    grid.nodes[NODE + 3] = saying("dan", 1)
    assert names(transport) == ["ann", "bob", "dan"]
    assert {id(profile.foundation) for profile in transport.profiles.values()} == {id(transport.foundation)}
    grid.nodes[NODE + 4] = saying("eve", 1)
    assert names(transport)[-1] == "eve"
    assert transport.profiles["eve"].foundation is transport.foundation


def test_nothing_is_kept_of_a_client_that_has_gone(clock: Clock) -> None:
    grid = fleet("ann", "bob")
    transport = over(grid, clock, expected=2)
    transport.clients()
    gone = ref(transport.profiles["bob"])
    del grid.nodes[NODE + 1]
    assert names(transport) == ["ann"]
    collect()
    assert gone() is None


def test_nothing_is_kept_of_a_base_that_was_refused(clock: Clock) -> None:
    held = list[ReferenceType[ModelSpec]]()

    def node(message: Message) -> RecordDict:
        return greeting(profile("bob", foundation=replace(FOUNDATION, base="77" * 32)))

    transport = over(fleet("ann", "bob", "cyd", bob=node), clock, expected=2)
    original = transport._reject

    def noted(node: int, *rest: object, **more: object) -> None:
        held.extend(ref(one) for one in transport._foundations.values() if one.base != FOUNDATION.base)
        original(node, *rest, **more)  # type: ignore[arg-type]

    transport._reject = noted  # type: ignore[method-assign]
    assert names(transport) == ["ann", "cyd"]
    collect()
    assert [one() for one in held] == [None]


@pytest.mark.parametrize("place", ["error", "base"])
def test_no_text_of_a_client_moves_the_cursor(place: str, clock: Clock) -> None:
    hostile = "x\x1b[2J\r\u202e\x9b\ny"
    foundation = replace(FOUNDATION, base=hostile if place == "base" else FOUNDATION.base)

    def node(message: Message) -> RecordDict | Error:
        return Error(5, hostile) if place == "error" else greeting(profile("bob", foundation=foundation))

    notes = list[str]()
    transport = GridTransport(
        fleet("ann", "bob", bob=node), expected=2, note=notes.append, patience_s=10, clock=clock, sleep=clock.sleep
    )
    with pytest.raises(RoundError, match=r"bob|unnamed") as error:
        transport.clients()
    for text in [str(error.value), *notes]:
        assert text.isprintable()
