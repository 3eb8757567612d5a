"""What the kernel counts on a connection, held against a forwarder that counts the same bytes."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.link.client import socket_bytes
from fedtune.link.client.socket_bytes import SocketBytes, SocketMeter, dialled_port, open_connections
from fedtune.link.settings import JoinSettings
from tests.link.link_server import SETTINGS, LinkServer, run_link_server
from tests.link.proxy import Fate, proxy
from tests.link.site import collect_one, post, run_site, until

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="TCP_INFO is Linux's")


def test_the_bytes_of_a_round_are_those_that_a_forwarder_counts(link: LinkServer) -> None:
    with proxy(lambda number: Fate()) as between:
        between.target, link.port = link.port, between.port
        with run_site(link) as running:
            until(link, lambda: "loaded" in running.kinds())
            for number in (1, 2):
                before = list(between.carried)
                collect_one(link, post(link, number, body=b"x" * 100_000))
                link.dispatcher.settle("site-a", number, None)
                until(link, lambda number=number: running.kinds().count("trained") == number)  # type: ignore[misc]
            (event,) = [fields for kind, fields in running.events if kind == "trained"][1:]
            after = between.carried
            for name, payload, place in (("line_up", 300_000, 0), ("line_down", 100_000, 1)):
                # Signs of life may travel before and after the event that is read here.
                assert payload < event[name] < payload + 12_000
                assert abs(event[name] - (after[place] - before[place])) < 4_000


def test_a_round_of_200_directions_takes_little_more_than_a_kilobyte_on_the_line(tmp_path: Path) -> None:
    """257 bytes of payload: with signature, names, digests, TLS and HTTP/2, from one receipt to the next."""
    with run_link_server(tmp_path, replace(SETTINGS, inline_kib=64, hold_s=20)) as link, run_site(link) as running:
        until(link, lambda: "loaded" in running.kinds())
        running.trainer.size = 257
        for number in (1, 2, 3):
            collect_one(link, post(link, number))
            link.dispatcher.settle("site-a", number, None)
            until(link, lambda number=number: running.kinds().count("trained") == number)  # type: ignore[misc]
        rounds = [fields for kind, fields in running.events if kind == "trained"]
        assert {fields["up"] for fields in rounds} == {257}
        assert all(257 < fields["line_up"] < 1_300 for fields in rounds[1:]), rounds
        assert all(fields["line_down"] < 2_000 for fields in rounds[1:]), rounds
        assert rounds[0]["line_up"] < 5_000  # with the handshake, in which the site sends its certificate


def test_only_connections_to_the_server_count() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        meter = SocketMeter(port)
        assert meter.read() == SocketBytes()
        with socket.create_connection(("127.0.0.1", port)) as client:
            server, _ = listener.accept()
            client.sendall(b"x" * 1000)
            assert len(server.recv(1000, socket.MSG_WAITALL)) == 1000
            assert meter.read() == SocketBytes(up=1000)
            server.sendall(b"y" * 70)
            assert len(client.recv(70, socket.MSG_WAITALL)) == 70
            assert meter.read() == SocketBytes(up=1000, down=70)
            server.close()
        assert meter.read() == SocketBytes(up=1000, down=70)  # of a connection that has been closed
        assert open_connections(port) == {}


def test_a_number_that_the_system_gives_again_begins_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: Iterator[Mapping[str, tuple[int, int]] | None] = iter(
        [{"socket:[1]": (10, 20)}, {"socket:[1]": (4, 30)}, {"socket:[2]": (1, 1)}, None]
    )
    monkeypatch.setattr(socket_bytes, "open_connections", lambda port: next(looks))
    meter = SocketMeter(1)
    assert [meter.read() for _ in range(4)] == [SocketBytes(10, 20), SocketBytes(14, 50), SocketBytes(15, 51), None]


@pytest.mark.parametrize(
    ("settings", "port"),
    [
        (JoinSettings("fl.example.org:9000"), 9000),
        (JoinSettings("[::1]:9001"), 9001),
        (JoinSettings("fl.example.org:9000", proxy="http://proxy.example.org:3128/"), 3128),
        (JoinSettings("nothing"), 0),
    ],
)
def test_connections_lead_to_the_proxy_if_there_is_one(settings: JoinSettings, port: int) -> None:
    assert dialled_port(settings) == port
