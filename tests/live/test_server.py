from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from fedtune.errors import ConfigError
from fedtune.live import server as server_module
from fedtune.live.feed import Feed
from fedtune.live.server import LiveAddress, serve_live
from fedtune.rounds.events import Note


@pytest.fixture
def feed() -> Feed:
    return Feed("ward", rounds=3)


def ask(address: LiveAddress, path: str = "/", method: str = "GET", **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", address.port, timeout=30)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    return connection.getresponse()


@contextmanager
def events(address: LiveAddress, **headers: str) -> Iterator[Iterator[Any]]:
    """Give the contents of the messages of a stream, as they come."""
    with closing(ask(address, "/events", **headers)) as answer:
        assert answer.status == 200

        def contents() -> Iterator[Any]:
            while line := answer.readline():
                if line.startswith(b"data: "):
                    yield json.loads(line[6:])

        yield contents()


def test_the_page_is_sent_with_its_policy_and_is_not_stored(feed: Feed) -> None:
    with serve_live(feed, port=0) as address:
        assert address.url == f"http://127.0.0.1:{address.port}/"
        assert not address.warning
        answer = ask(address)
        assert answer.status == 200
        assert b"fedtune live" in answer.read()
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert "Python" not in answer.headers["Server"]
        head = ask(address, method="HEAD")
        assert (head.status, head.read()) == (200, b"")
        assert int(head.headers["Content-Length"]) > 10_000


def test_a_stream_brings_everything_then_changes_and_the_last_one_when_the_run_is_over(feed: Feed) -> None:
    with serve_live(feed, port=0) as address, events(address) as stream:
        assert next(stream)["head"]["name"] == "ward"
        feed(Note("one remark"))
        assert next(stream)["notes"] == ["one remark"]
        with events(address) as other:
            assert next(other)["reset"] is True
        feed.set_state("finished")
        feed.close()
        assert [content["head"]["state"] for content in stream][-1] == "finished"


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8008", "", "[", "10.0.0.1"]
)
def test_a_name_that_leads_here_for_a_moment_is_refused(feed: Feed, host: str) -> None:
    with serve_live(feed, port=0) as address:
        for path in ("/", "/events"):
            assert ask(address, path, Host=host).status == 403


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:1234", "[::1]:8008"])
def test_a_tunnel_from_another_machine_is_this_machine_under_any_port(feed: Feed, host: str) -> None:
    with serve_live(feed, port=0) as address:
        assert ask(address, Host=host).status == 200


def test_a_page_of_another_site_cannot_read_the_events(feed: Feed) -> None:
    with serve_live(feed, port=0) as address:
        for site in ("cross-site", "same-site"):
            assert ask(address, "/events", Sec_Fetch_Site=site).status == 403
        with events(address, Sec_Fetch_Site="same-origin") as stream:
            assert next(stream)["reset"]


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE"])
def test_nothing_can_be_written(feed: Feed, method: str) -> None:
    with serve_live(feed, port=0) as address:
        answer = ask(address, method=method)
        assert (answer.status, answer.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/etc/passwd", "/../../etc/passwd", "/events/", "/%2e%2e/", "/state", "/?x=1"])
def test_there_are_two_paths(feed: Feed, path: str) -> None:
    with serve_live(feed, port=0) as address:
        assert ask(address, path).status == (200 if path == "/?x=1" else 404)


def test_other_machines_need_the_token_which_goes_into_a_cookie(feed: Feed) -> None:
    with serve_live(feed, host="0.0.0.0", port=0) as address:
        assert "unencrypted" in address.warning
        token = address.url.partition("?token=")[2]
        assert len(token) >= 32
        for path in ("/", "/events", "/?token=wrong", f"/?token={token[:-1]}", f"/events?token={token}"):
            assert ask(address, path).status == 403, path
        let_in = ask(address, f"/?token={token}")
        assert (let_in.status, let_in.headers["Location"]) == (303, "/")
        cookie = let_in.headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite" in cookie
        pair = cookie.partition(";")[0]
        assert ask(address, Cookie=pair).status == 200
        assert ask(address, Host="fl.example.org", Cookie=pair).status == 200
        assert ask(address, Cookie=pair.replace(token, "wrong")).status == 403
        assert ask(address, Cookie='"; ;=\x01').status == 403
        # Those of programs on other ports, which http.cookies cannot read.
        assert ask(address, Cookie=f'theme; a[1]={{"x": 1}}; {pair}').status == 200
        with events(address, Cookie=pair) as stream:
            assert next(stream)["reset"]


def test_two_runs_are_shown_at_once_and_a_port_that_is_taken_is_an_error(feed: Feed) -> None:
    with serve_live(feed) as first, serve_live(Feed("other")) as second:
        assert first.port != second.port
        expected = rf"--live: expected an address that is free; got .*:{first.port} \(.*--live-port"
        with pytest.raises(ConfigError, match=expected), serve_live(feed, port=first.port):
            pass


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "127.0.0.1:9001"])
def test_an_address_of_another_machine_is_named_as_what_is_wrong(feed: Feed, host: str) -> None:
    expected = f"--live-address: expected an address of this machine, without a port; got '{host}'"
    with pytest.raises(ConfigError, match=expected), serve_live(feed, host=host):
        pass


def test_more_pages_than_a_few_are_turned_away_and_closed_ones_make_room(
    feed: Feed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "MOST_PAGES", 1)
    monkeypatch.setattr(server_module, "KEEP_ALIVE_S", 0.02)
    with serve_live(feed, port=0) as address:
        with events(address) as stream:
            next(stream)
            assert ask(address, "/events").status == 503
        statuses = (ask(address, "/events", "HEAD").status for _ in range(10_000))
        assert 200 in statuses  # once the server has noticed that nothing reads the first one


def test_a_client_that_says_nothing_or_nonsense_costs_others_nothing(
    feed: Feed, capfd: pytest.CaptureFixture[str]
) -> None:
    with serve_live(feed, port=0) as address:
        place = ("127.0.0.1", address.port)
        with socket.create_connection(place), socket.create_connection(place) as bad:
            bad.sendall(b"\x16\x03\x01\x02\x00\x01\r\n\r\n" + b"A" * 70_000)
            assert ask(address).status == 200
    assert not capfd.readouterr().err
