"""Connections by hand, and on loopback: strangers are closed before they keep a member out."""

from __future__ import annotations

import os
import resource
import select
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.link.server.connections import (
    MOST_OF_MEMBER,
    STRANGERS,
    Connection,
    Connections,
    connection_limit,
    list_sockets,
    parse_peer,
    peer_of,
    shut,
    source_of,
    superfluous,
)
from fedtune.wire.v1 import link_pb2 as pb
from tests.link.harness import Clock
from tests.link.link_server import SETTINGS, LinkServer, greeting, run_link_server


def connection(place: int, since: float, *, source: str = "192.0.2.1", client: str = "") -> Connection:
    return Connection(place, place, (source, 1000 + place), since, client)


def closed(connections: Sequence[Connection], now: float, *, per_source: int = 2, strangers: int = 4) -> list[int]:
    close = superfluous(connections, now, handshake_s=5, per_source=per_source, strangers=strangers)
    return sorted(each.descriptor for each in close)


@pytest.mark.guarantee("G14")
def test_a_connection_must_call_in_time_and_one_that_has_called_may_stay() -> None:
    connections = [connection(1, 0.0), connection(2, 0.0, client="anna"), connection(3, 1.0)]
    assert closed(connections, 4.9) == []
    assert closed(connections, 5.0) == [1]
    assert closed(connections, 100.0) == [1, 3]


@pytest.mark.guarantee("G14")
def test_of_one_source_the_oldest_strangers_go_and_other_sources_are_not_touched() -> None:
    flood = [connection(place, place / 10) for place in range(5)]
    other = [connection(9, 0.0, source="192.0.2.2")]
    assert closed([*flood, *other], 1.0) == [0, 1, 2]


@pytest.mark.guarantee("G14")
def test_of_all_sources_the_one_with_the_most_makes_room() -> None:
    connections = [connection(place, place / 10) for place in range(3)]
    connections += [connection(10 + place, 0.0, source=f"198.51.100.{place}") for place in range(3)]
    assert closed(connections, 1.0, per_source=3) == [0, 1]


@pytest.mark.guarantee("G14")
def test_a_member_keeps_its_four_newest_connections() -> None:
    own = [connection(place, float(place), client="anna") for place in range(MOST_OF_MEMBER + 2)]
    assert closed([*own, connection(20, 0.0, client="bert")], 1000.0) == [0, 1]


def test_sources_and_peers_have_one_spelling() -> None:
    assert source_of("192.0.2.7") == source_of("::ffff:192.0.2.7") == "192.0.2.7"
    assert source_of("2001:db8::1") == source_of("2001:db8::ffff:1") == "2001:db8::/64"
    assert source_of("fe80::1%eth0") == "fe80::/64"
    assert parse_peer("ipv4:192.0.2.1:5000") == ("192.0.2.1", 5000)
    assert parse_peer("ipv6:%5B2001:db8::1%5D:5000") == ("2001:db8::1", 5000)
    assert parse_peer("ipv6:[::ffff:192.0.2.1]:5000") == ("192.0.2.1", 5000)
    assert parse_peer("unix:/run/socket") is None


def test_the_limit_leaves_descriptors_for_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda what: (1024, 1024))
    assert connection_limit(3) == 768
    assert connection_limit(1000) == 2016  # below two for each party the link does not work
    monkeypatch.setattr(resource, "getrlimit", lambda what: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert connection_limit(3) == 12 + STRANGERS


def test_a_descriptor_that_is_something_else_by_now_is_left_alone() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client, listener.accept()[0] as served:
            inode = os.fstat(served.fileno()).st_ino
            assert (served.fileno(), inode) in list(list_sockets())
            assert peer_of(served.fileno(), inode, port) == client.getsockname()
            assert peer_of(client.fileno(), os.fstat(client.fileno()).st_ino, port) is None
            assert peer_of(listener.fileno(), os.fstat(listener.fileno()).st_ino, port) is None
            assert peer_of(served.fileno(), inode + 1, port) is None
            shut(Connection(served.fileno(), inode + 1, ("127.0.0.1", 1), 0.0))
            client.sendall(b"x")
            assert served.recv(1) == b"x"
            shut(Connection(served.fileno(), inode, ("127.0.0.1", 1), 0.0))
            assert client.recv(1) == b""


def test_connections_are_known_by_their_calls() -> None:
    clock = Clock()
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        port = listener.getsockname()[1]
        connections = Connections(handshake_s=5, per_source=10, limit=100, clock=clock)
        ends = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(2)]
        for _ in ends:
            stack.enter_context(listener.accept()[0])
        assert connections.look(port) == 0
        connections.note_call(f"ipv4:127.0.0.1:{ends[0].getsockname()[1]}", "anna")
        clock.now += 5
        assert connections.look(port) == 1
        assert ends[1].recv(1) == b""
        assert not connections.close("ipv4:127.0.0.1:1")
        assert connections.close(f"ipv4:127.0.0.1:{ends[0].getsockname()[1]}")
        assert ends[0].recv(1) == b""


@contextmanager
def bare_connections(port: int, number: int, *, first: bytes = b"") -> Iterator[Sequence[socket.socket]]:
    """Hold connections that say nothing, or no more than a few bytes."""
    with ExitStack() as stack:
        ends = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(number)]
        for end in ends:
            end.sendall(first)
        yield ends


def is_refused(end: socket.socket) -> bool:
    """Return whether the server has closed a connection; waits for that."""
    end.settimeout(30)
    try:
        return end.recv(1) == b""
    except ConnectionError:
        return True


@pytest.mark.guarantee("G14")
@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01\x02\x00\x01\x00"], ids=["bare", "half a handshake"])
def test_a_member_gets_in_while_400_connections_are_held(link: LinkServer, first: bytes) -> None:
    """With 22 the server was full."""
    with bare_connections(link.port, 400, first=first) as ends:
        for _ in range(3):
            assert greeting(link.calls()).epoch
        refused = set[socket.socket]()
        while len(refused) < 400 - SETTINGS.max_source_handshakes:
            refused |= {end for end in select.select(ends, [], [])[0] if end not in refused and is_refused(end)}
        assert greeting(link.calls("site-b")).epoch


@pytest.mark.guarantee("G14")
def test_a_member_gets_in_while_connections_arrive_all_the_time(link: LinkServer) -> None:
    """With five a second the server was full."""
    ends, sockets = threading.Event(), list[socket.socket]()

    def arrive() -> None:
        while not ends.wait(0.002):
            sockets.append(socket.create_connection(("127.0.0.1", link.port)))

    thread = threading.Thread(target=arrive)
    thread.start()
    try:
        while len(sockets) < 50:
            assert greeting(link.calls()).epoch
    finally:
        ends.set()
        thread.join()
        for end in sockets:
            end.close()


@pytest.mark.guarantee("G14")
def test_handshakes_that_do_not_finish_in_time_are_closed(tmp_path: Path) -> None:
    with run_link_server(tmp_path, replace(SETTINGS, handshake_s=0.2)) as link:
        calls = link.calls()
        epoch = greeting(calls).epoch
        with bare_connections(link.port, 3) as ends:
            assert all(is_refused(end) for end in ends)
        assert not calls.next(pb.NextRequest(epoch=epoch), timeout=10).HasField("refusal")
