"""HTTP/2 by hand: a server that opens it, and everything that answers in its place."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.link.client.http2 import PREFACE, SUPERLINK, check_frame, check_protocol
from fedtune.link.client.http_proxy import RouteError
from fedtune.link.client.route import diagnose, walk
from fedtune.link.settings import JoinSettings
from tests.link.link_server import LinkServer, run_link_server
from tests.link.middlebox import ending_tls, listening

SETTINGS_FRAME = bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))


def diagnosis_of(running: LinkServer, then: Callable[[ssl.SSLSocket], None], protocols: tuple[str, ...]) -> str:
    """Return what a site says of a program that ends TLS with the server's own certificate."""
    place = running.places["server"]
    with listening(ending_tls(place / "tls.crt", place / "tls.key", protocols=protocols, then=then)) as box:  # type: ignore[arg-type]
        diagnosis = diagnose(running.identities["site-a"], JoinSettings(f"localhost:{box.port}"))
    assert not diagnosis.permanent
    assert diagnosis.reason.isprintable()
    return diagnosis.reason


def test_each_way_to_block_http2_is_named(tmp_path: Path) -> None:
    def wait(tls: ssl.SSLSocket) -> None:
        tls.recv(1)

    def cut(tls: ssl.SSLSocket) -> None:
        tls.recv(len(PREFACE))

    def html(tls: ssl.SSLSocket) -> None:
        tls.recv(len(PREFACE))
        tls.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\n\r\n<html>")

    def garbage(tls: ssl.SSLSocket) -> None:
        tls.sendall(b"\x00" * 64)
        tls.recv(1)

    with run_link_server(tmp_path) as running:
        for protocols, got in (((), "no protocol"), (("http/1.1",), "no protocol")):
            reason = diagnosis_of(running, wait, protocols)
            assert f"agrees on {got} where fedtune offers HTTP/2" in reason
            assert SUPERLINK in reason
        assert f"is cut where HTTP/2 begins; {SUPERLINK}" in diagnosis_of(running, cut, ("h2",))
        reason = diagnosis_of(running, html, ("h2",))
        assert "answers HTTP/2 with 'HTTP/1.1 400 Bad Request'" in reason
        assert SUPERLINK in reason
        assert "check that link.address is a fedtune server's" in diagnosis_of(running, garbage, ("h2",))


def test_a_server_that_opens_http2_is_not_to_blame(tmp_path: Path) -> None:
    def answer(tls: ssl.SSLSocket) -> None:
        assert tls.recv(4096)[: len(PREFACE)] == PREFACE
        tls.sendall(SETTINGS_FRAME)
        tls.recv(1)

    with run_link_server(tmp_path) as running:
        assert "does not answer calls" in diagnosis_of(running, answer, ("h2",))
        steps = list(walk(running.identities["site-a"], JoinSettings(f"localhost:{running.port}")))
        assert [step.name for step in steps if step.ok] == ["name", "port", "TLS", "HTTP/2"]


@pytest.mark.parametrize("agreed", [None, "http/1.1", "x\x1b" * 200])
def test_another_protocol_is_one_sentence(agreed: str | None) -> None:
    check_protocol("h2", "a:1")
    with pytest.raises(RouteError) as caught:
        check_protocol(agreed, "a:1")
    assert caught.value.reason.isprintable()


@given(data=st.binary(max_size=40))
def test_any_first_bytes_are_settings_or_one_sentence(data: bytes) -> None:
    check_frame(SETTINGS_FRAME + data, "a:1")
    if data[3:4] == b"\x04" and len(data) >= 9:
        return
    with pytest.raises(RouteError) as caught:
        check_frame(data, "a:1")
    assert caught.value.reason.isprintable()
    assert len(caught.value.reason) < 400


def test_a_server_that_goes_away_says_so() -> None:
    with pytest.raises(RouteError, match="a:1 asks to go away"):
        check_frame(bytes((0, 0, 8, 7, 0, 0, 0, 0, 0)), "a:1")
