"""The proxy of a site: its address and password, and every way in which it does not open a tunnel."""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import ConfigError
from fedtune.link.client.http_proxy import (
    HttpProxy,
    RouteError,
    environment_proxy,
    open_tunnel,
    parse_proxy,
    read_credentials,
    settle_proxy,
)
from fedtune.link.settings import JoinSettings
from tests.link.middlebox import ESTABLISHED, Behaviour, Box, listening, proxying, saying, silent, streaming

SECRET = "pa:ss w/rd"


def tunnel_error(behaviour: Callable[[Box], Behaviour], *, user: str = "", timeout_s: float = 10.0) -> RouteError:
    """Return why a proxy does not open a tunnel."""
    with listening(behaviour) as box, socket.create_connection(("127.0.0.1", box.port)) as connection:
        proxy = HttpProxy("127.0.0.1", box.port, user, SECRET if user else "")
        with pytest.raises(RouteError) as caught:
            open_tunnel(connection, proxy, "fl.example.org:443", timeout_s=timeout_s)
    assert SECRET not in caught.value.reason
    assert "\n" not in caught.value.reason
    return caught.value


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("http://proxy.example.org:3128", "proxy.example.org", 3128),
        ("HTTP://proxy.example.org:3128/", "proxy.example.org", 3128),
        ("proxy:80", "proxy", 80),
        ("http://[fd00::1]:8080", "fd00::1", 8080),
    ],
)
def test_the_url_of_a_proxy(text: str, host: str, port: int) -> None:
    assert parse_proxy(text) == HttpProxy(host, port)


@given(user=st.text(min_size=1, max_size=20), password=st.text(max_size=20))
def test_user_and_password_survive_the_url(user: str, password: str) -> None:
    proxy = HttpProxy("proxy.example.org", 3128, user, password)
    assert parse_proxy(proxy.url) == proxy
    assert proxy.label == "http://proxy.example.org:3128"
    assert repr(proxy) == repr(HttpProxy("proxy.example.org", 3128, user))


@pytest.mark.parametrize(
    "text",
    [
        "https://anna:geheim@proxy:3128",
        "socks5://anna:geheim@proxy:1080",
        "http://anna:geheim@proxy",
        "anna:geheim",
        "http://anna:geheim@proxy:port",
        "http://anna:geheim@pro xy:1",
        "http://anna:geheim@proxy:3128/path",
        "http://anna:12/geheim@proxy:3128",
    ],
)
def test_a_proxy_that_is_none_is_one_sentence_without_its_password(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^link.proxy: expected .*http://HOST:PORT; got ") as caught:
        parse_proxy(text)
    assert "geheim" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_password_comes_from_a_file_that_its_owner_alone_may_read(tmp_path: Path) -> None:
    path = tmp_path / "proxy.secret"
    settings = JoinSettings("fl.example.org:443", proxy="http://proxy:3128", proxy_credentials="proxy.secret")
    with pytest.raises(ConfigError, match="No such file"):
        settle_proxy(settings, tmp_path, {})
    path.write_text(f"anna:{SECRET}\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        settle_proxy(settings, tmp_path, {})
    path.chmod(0o600)
    settled = settle_proxy(settings, tmp_path, {})
    assert parse_proxy(settled.proxy) == HttpProxy("proxy", 3128, "anna", SECRET)
    assert "anna" not in repr(settled)
    for wrong in (b"anna", b":x", b"\xff:x", b"a:" + b"x" * 2000, b"a:x\nb:y\n", b""):
        path.write_bytes(wrong)
        with pytest.raises(ConfigError, match="USER:PASSWORD"):
            read_credentials(path)


def test_the_environment_counts_only_where_the_file_says_so(tmp_path: Path) -> None:
    environment = {"HTTPS_PROXY": "http://anna:x@proxy:3128", "NO_PROXY": "localhost,.inside.example"}
    straight = JoinSettings("fl.example.org:443")
    assert settle_proxy(straight, tmp_path, environment).proxy == ""
    named = JoinSettings("fl.example.org:443", proxy="environment")
    assert settle_proxy(named, tmp_path, environment).proxy == "http://anna:x@proxy:3128"
    assert settle_proxy(named, tmp_path, {}).proxy == ""
    inside = JoinSettings("fl.inside.example:443", proxy="environment")
    assert settle_proxy(inside, tmp_path, environment).proxy == ""
    with pytest.raises(ConfigError, match="HTTPS_PROXY: expected"):
        settle_proxy(named, tmp_path, {"https_proxy": "socks5://proxy:1"})


@pytest.mark.parametrize(
    ("spared", "host", "is_spared"),
    [
        ("*", "a.example", True),
        ("example", "a.example", True),
        (".a.example", "a.example", True),
        ("*.example", "a.example", True),
        ("A.Example", "a.example", True),
        ("b.example,a.example:443", "a.example", True),
        ("a.example:80", "a.example", False),
        ("ample", "a.example", False),
        ("10.0.0.0/8 ,x", "10.9.9.9", True),
        ("10.0.0.0/8", "11.9.9.9", False),
        ("fd00::/8", "fd00::1", True),
        ("10.0.0.0/8", "a.example", False),
        ("", "a.example", False),
    ],
)
def test_hosts_that_no_proxy_spares(spared: str, host: str, is_spared: bool) -> None:
    environment = {"https_proxy": "proxy:1", "no_proxy": spared}
    assert (environment_proxy(environment, host, "443") == "") is is_spared


@pytest.mark.parametrize(
    ("answer", "words", "permanent"),
    [
        (b"HTTP/1.1 403 Forbidden\r\n\r\n", "403 (Forbidden): it does not allow CONNECT to fl.example.org:443", False),
        (b"HTTP/1.1 405 Nope\r\n\r\n", "it does not tunnel", False),
        (b"HTTP/1.1 502 Bad Gateway\r\n\r\n", "it does not reach fl.example.org:443", False),
        (b"HTTP/1.1 302 Found\r\nLocation: http://login\r\n\r\n", "perhaps to log in", False),
        (b"HTTP/1.1 407 Who\r\nProxy-Authenticate: NTLM\r\nproxy-authenticate: X y\r\n\r\n", "wants NTLM, X,", True),
        (b"HTTP/1.1 407 Who\r\nProxy-Authenticate: Basic realm=\"x\"\r\n\r\n", "link.proxy_credentials", True),
        (b"<html>log in</html>", "got an answer that begins '<html>", False),
        (b"\x15\x03\x03\x00\x02\x02\x46", "expected an HTTP proxy at", False),
        (b"HTTP/1.1 999 x\r\n\r\n", "expected an HTTP proxy at", False),
        (b"HTTP/1.1 200 OK\r\n", "in the middle of its answer", False),
        (b"", "without a word", False),
        (ESTABLISHED + b"<html>", "6 bytes that are not the server's", False),
        (b"HTTP/1.1 403 \x1b[31m" + b"x" * 5000 + b"\r\n\r\n", "answers 403 ([31mx", False),
    ],
)  # fmt: skip
def test_a_proxy_that_does_not_tunnel_is_one_sentence(answer: bytes, words: str, permanent: bool) -> None:
    error = tunnel_error(saying(answer))
    assert words in error.reason
    assert error.permanent is permanent
    assert error.reason.isprintable()
    assert len(error.reason) < 400


def test_a_wrong_password_ends_the_site_before_it_locks_the_account() -> None:
    error = tunnel_error(proxying("anna:right"), user="anna")
    assert "it rejects the password of 'anna'" in error.reason
    assert error.permanent


def test_an_endless_header_takes_neither_memory_nor_time() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for block in (b"X: y\r\n" * 1000, b"x" * 2**20):
        assert "header of more than 16 KiB" in tunnel_error(streaming(block, b"HTTP/1.1 200 OK\r\nX: ")).reason
    assert "begins" in tunnel_error(streaming(b"\0" * 2**20)).reason
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024


def test_a_slow_proxy_is_left_after_its_time_however_it_drips() -> None:
    began = time.monotonic()
    assert "does not answer CONNECT in time; it sent 0 bytes" in tunnel_error(silent, timeout_s=0.2).reason
    dripping = streaming(b"x", b"HTTP/1.1 200 OK\r\nX: ", pause_s=0.02)
    assert "does not answer CONNECT in time" in tunnel_error(dripping, timeout_s=0.3).reason
    assert time.monotonic() - began < 60  # and not the hours that 16 KiB of drops would take


@given(answer=st.binary(max_size=300))
def test_any_answer_of_a_proxy_is_a_yes_or_one_sentence(answer: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        reason = ""
        try:
            open_tunnel(ours, HttpProxy("proxy", 1), "fl.example.org:443", timeout_s=10)
        except RouteError as error:
            reason = error.reason
    accepted = answer.startswith(b"HTTP/1.") and answer.endswith(b"\r\n\r\n")
    assert accepted or reason
    assert reason.isprintable()
    assert len(reason) < 400
