from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Message, MessageType

from fedtune.flower.grid_transport import HELLO, GridTransport
from fedtune.flower.link_grid import LinkGrid, node_of
from fedtune.flower.records import pack, unpack
from fedtune.link.statements import digest
from fedtune.round import Failure
from fedtune.transport import Reply, Rule
from fedtune.wire.messages import encode_update
from fedtune.wire.profile import ClientProfile, encode_profile
from fedtune.wire.v1 import link_pb2 as pb
from tests.flower.conftest import FOUNDATION, flower_task
from tests.link.conftest import Desk, answer, assignment, made, part
from tests.link.scripted import work

__all__ = ["flower_task"]  # a fixture


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
    return made(tmp_path)


def answered(desk: Desk, client: str, *bodies: tuple[str, bytes]) -> None:
    """Answer the order that a client is offered."""
    offered = desk.hub.offer(client, ())
    assert offered is not None
    order = pb.Header.FromString(offered.work.order.header)
    parts = [part(key, data) for key, data in sorted(bodies)]
    sent = answer(client, order, digest(offered.work.order), b"", parts=parts)
    desk.submit(client, sent, *(data for _, data in bodies))


def test_clients_are_nodes_under_the_names_of_the_roster(desk: Desk) -> None:
    grid = LinkGrid(desk.hub)
    assert grid.get_nodes() == []
    desk.hub.sign_of_life("anna")
    (node,) = grid.get_nodes()
    assert (node.node_id, node.name) == (node_of("anna"), "anna")
    assert node_of("anna") > 2**53
    assert list(grid.get_node_ids()) == [node_of("anna")]
    assert grid.run.run_id == 1


def test_a_message_comes_back_as_the_client_answered_it(desk: Desk) -> None:
    grid = LinkGrid(desk.hub)
    desk.hub.sign_of_life("anna")
    grid.get_nodes()
    message = Message(pack(b"", {}), node_of("anna"), HELLO, ttl=60)
    (message_id,) = grid.push_messages([message])
    assert message.metadata.message_id == message_id
    assert grid.pull_messages([message_id]) == []
    answered(desk, "anna", ("", b"front"), ("k", b"body"))
    (reply,) = grid.pull_messages([message_id, "unknown"])
    assert reply.metadata.reply_to_message_id == message_id
    content = unpack(reply.content)
    assert (content.header, {key: bytes(body) for key, body in content.blobs.items()}) == (b"front", {"k": b"body"})
    assert grid.pull_messages([message_id]) == []


def test_who_is_not_there_is_not_asked(desk: Desk) -> None:
    grid = LinkGrid(desk.hub)
    assert list(grid.push_messages([Message(pack(b"", {}), 7, HELLO, ttl=60)])) == [""]


def test_a_round_goes_over_it_with_an_answer_and_a_decline(desk: Desk) -> None:
    grid = LinkGrid(desk.hub)
    transport = GridTransport(grid, expected=2, sleep=lambda seconds: serve())
    for name in ("anna", "bob"):
        desk.hub.sign_of_life(name)
    data = encode_update(work_of("anna"))
    desk.hub.limit = lambda front: len(data)

    def serve() -> None:
        """Stand for the clients, whenever the server waits."""
        for name in ("anna", "bob"):
            offered = desk.hub.offer(name, ())
            if offered is None:
                continue
            order = pb.Header.FromString(offered.work.order.header)
            if order.task == HELLO:
                profile = encode_profile(ClientProfile(name, 10, FOUNDATION))
                answered(desk, name, ("", profile.header), *profile.blobs.items())
            elif name == "anna":
                answered(desk, name, ("update", data))
            else:
                note = pb.Decline(veto=pb.OPERATOR, note="not today")
                changes = {"kind": pb.DECLINE, "parts": [], "decline": note}
                desk.submit(name, answer(name, order, digest(offered.work.order), b"", **changes))

    assert [one.name for one in transport.clients()] == ["anna", "bob"]
    orders = {name: assignment(name, 1) for name in ("anna", "bob")}
    found = {one.client: one for one in transport.exchange(orders, Rule(quorum=1))}
    assert found["anna"] == Reply("anna", found["anna"].update)  # type: ignore[union-attr]
    assert bytes(found["anna"].update) == data
    assert found["bob"] == Failure("bob", "declined, OPERATOR: not today")


def work_of(name: str):  # type: ignore[no-untyped-def]
    from fedtune.wire.messages import decode_assignment

    order = assignment(name, 1)
    return work(decode_assignment(order.header, order.blobs))


def test_messages_can_be_sent_and_waited_for_as_with_any_grid(desk: Desk) -> None:
    grid = LinkGrid(desk.hub)
    desk.hub.sign_of_life("anna")
    grid.get_nodes()
    order = assignment("anna", 1)
    message = Message(pack(order.header, order.blobs), node_of("anna"), MessageType.TRAIN, ttl=60)
    assert list(grid.send_and_receive([message], timeout=0.0)) == []
    grid.doze(0.0)
    desk.hub.end(1)
    (message_id,) = [message.metadata.message_id]
    (reply,) = grid.pull_messages([message_id])
    assert reply.error.reason == "its round has ended"
