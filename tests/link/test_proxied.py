"""A site behind an HTTP proxy takes part through it, and no answer costs memory, an account or a secret."""

from __future__ import annotations

import resource
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from fedtune.errors import ConfigError
from tests.link.link_server import SETTINGS, run_link_server
from tests.link.middlebox import Box, listening, proxying, streaming
from tests.link.site import END_S, collect_one, post, run_site, until


def proxy_of(box: Box, login: str = "") -> dict[str, str]:
    return {"proxy": f"http://{login}{'@' * bool(login)}127.0.0.1:{box.port}"}


def test_a_site_takes_part_through_a_proxy_that_asks_for_a_password(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running, listening(proxying("anna:geheim")) as box:
        with run_site(running, bandwidth=proxy_of(box, "anna:geheim")) as site:
            until(running, lambda: "loaded" in site.kinds())
            assert collect_one(running, post(running))  # an update, and the bytes of its answer
        assert {head.split()[1] for head in box.heads} == {f"localhost:{running.port}".encode()}
        assert "geheim" not in str(site.events)
    assert "unreached" not in site.kinds()


def test_a_wrong_password_is_tried_once(tmp_path: Path) -> None:
    with run_link_server(tmp_path) as running, listening(proxying("anna:right")) as box:
        with run_site(running, bandwidth=proxy_of(box, "anna:geheim")) as site:
            site.thread.join(END_S)
        assert len(box.heads) == 1
    (error,) = site.ended
    assert isinstance(error, ConfigError)
    assert "it rejects the password of 'anna'" in str(error)
    assert "geheim" not in str(error)


def test_a_proxy_that_answers_without_end_costs_no_memory(tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    endless = streaming(b"X: y\r\n" * 1000, b"HTTP/1.1 200 OK\r\nX: ")
    with (
        run_link_server(tmp_path) as running,
        listening(endless) as box,
        run_site(running, bandwidth=proxy_of(box)) as site,
    ):
        until(running, lambda: "unreached" in site.kinds())
    assert "header of more than 16 KiB" in dict(site.events)["unreached"]["reason"]
    # gRPC alone took 700 MiB of it.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024


def test_a_server_listens_on_port_443_where_it_may(tmp_path: Path) -> None:
    try:
        with socket.create_server(("127.0.0.1", 443)):
            pass
    except OSError as error:
        pytest.skip(f"port 443: {error}")
    with run_link_server(tmp_path, replace(SETTINGS, listen="127.0.0.1:443")) as running, run_site(running) as site:
        assert running.port == 443
        until(running, lambda: "hello" in site.kinds())


def test_the_example_of_a_shared_port_443_opens_no_tls() -> None:
    text = (Path(__file__).parents[2] / "server" / "link" / "nginx-stream.conf").read_text()
    assert "ssl_preread on;" in text
    assert "ssl_certificate" not in text
