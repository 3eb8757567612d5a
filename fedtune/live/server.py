"""Serves the live page and its events over plain HTTP: two paths, read only, on this machine unless asked otherwise."""

from __future__ import annotations

import errno
import hmac
import ipaddress
import json
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fedtune.errors import ConfigError, Fault
from fedtune.live.feed import Feed
from fedtune.live.page import live_page

LOOPBACK = "127.0.0.1"
PORT, TRIES = 8008, 20
"""The port without a wish, and how many are tried from there on: several runs may be looked at side by side."""
MOST_PAGES, MOST_CONNECTIONS = 20, 64
"""Pages open at a time, and connections of any kind; more are turned away."""
KEEP_ALIVE_S, PAUSE_S, TIMEOUT_S, FAREWELL_S = 5.0, 0.1, 10.0, 1.0
"""Between signs of life; between two messages; for a request or a page that does not read; for the last message."""


@dataclass(frozen=True)
class LiveAddress:
    """Where a page is served."""

    url: str
    port: int
    warning: str = ""
    """What others see, and how; empty where no other machine reaches it."""


class LiveServer(ThreadingHTTPServer):
    """The server of one feed."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: tuple[str, int], feed: Feed, token: str) -> None:
        """Listen on host and port; with a token only those who have it see anything."""
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.feed, self.token = feed, token
        self.pages = threading.BoundedSemaphore(MOST_PAGES)
        self._connections: set[int] = set()
        self._lock, self._idle = threading.Lock(), threading.Event()
        super().__init__(address, Answer)

    def server_bind(self) -> None:
        # Not HTTPServer's, which asks a name server for this machine's name.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Take no more connections than a few: each one has a thread."""
        with self._lock:
            if len(self._connections) >= MOST_CONNECTIONS:
                return False
            self._connections.add(id(request))
            return True

    def shutdown_request(self, request: Any) -> None:
        with self._lock:
            self._connections.discard(id(request))
            if not self._connections:
                self._idle.set()
        super().shutdown_request(request)

    def wait_until_idle(self, seconds: float) -> None:
        """Wait until every page has had the last message, though not for longer than that."""
        with self._lock:
            self._idle.clear()
            if not self._connections:
                return
        self._idle.wait(seconds)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a page that was closed."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


class Answer(BaseHTTPRequestHandler):
    """The answer to one request."""

    server: LiveServer
    timeout = TIMEOUT_S

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def answer(self) -> None:
        """Answer one of two paths, to those who may see them."""
        path, _, query = self.path.partition("?")
        if not self.may_come_under_this_name():
            self.say(HTTPStatus.FORBIDDEN, "this page is served to this machine alone, as http://127.0.0.1")
        elif path == "/" and self.brings_token(query):
            self.let_in()
        elif not self.has_token():
            self.say(HTTPStatus.FORBIDDEN, "open the address with its token, as fedtune has printed it")
        elif path == "/":
            page = live_page()
            self.begin(HTTPStatus.OK, "text/html; charset=utf-8", len(page.html))
            if self.command == "GET":
                self.wfile.write(page.html)
        elif path == "/events":
            self.stream()
        else:
            self.say(HTTPStatus.NOT_FOUND, "there are two paths: / and /events")

    def may_come_under_this_name(self) -> bool:
        """Return whether the request names this machine, where no token protects the page.

        A name that leads here for a moment, as a page of another site can have it, is what a browser would send.
        """
        if self.server.token:
            return True
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
        except ValueError:  # brackets that are no address
            return False
        return host is not None and is_loopback(host)

    def brings_token(self, query: str) -> bool:
        return bool(self.server.token) and any(map(self.is_token, parse_qs(query).get("token", ())))

    def has_token(self) -> bool:
        if not self.server.token:
            return True
        # Not http.cookies, which drops all for one that it cannot read: a browser also sends those of other ports.
        cookies = (part.strip().partition("=") for part in self.headers.get("Cookie", "").split(";"))
        return any(name == self.cookie and self.is_token(value) for name, _, value in cookies)

    def is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.server.token.encode())

    @property
    def cookie(self) -> str:
        """Its name; a browser keeps the cookies of all ports of a machine together."""
        return f"fedtune-live-{self.server.server_port}"

    def let_in(self) -> None:
        """Put the token into a cookie and the address without it into the browser's line."""
        self.send_response(HTTPStatus.SEE_OTHER)
        self.send_header("Set-Cookie", f"{self.cookie}={self.server.token}; HttpOnly; SameSite=Lax; Path=/")
        self.send_header("Location", "/")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def stream(self) -> None:
        """Send everything, then every change, until the page or the feed is closed."""
        if self.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            self.say(HTTPStatus.FORBIDDEN, "these events are for the page of this address")
            return
        if not self.server.pages.acquire(blocking=False):
            self.say(HTTPStatus.SERVICE_UNAVAILABLE, f"{MOST_PAGES} pages are open; close one")
            return
        try:
            self.begin(HTTPStatus.OK, "text/event-stream; charset=utf-8", None)
            if self.command == "GET":
                self.write_changes()
        finally:
            self.server.pages.release()

    def write_changes(self) -> None:
        feed, version = self.server.feed, 0
        self.wfile.write(b"retry: 1000\n\n")
        while True:
            closed = feed.closed
            version, content = feed.since(version)
            # As JSON in ASCII it has no line break, which would end the message.
            self.wfile.write(f"event: update\ndata: {json.dumps(content, allow_nan=False)}\n\n".encode("ascii"))
            if closed:
                return
            threading.Event().wait(PAUSE_S)  # changes that come together travel together
            while not feed.wait(version, KEEP_ALIVE_S):
                self.wfile.write(b": still there\n\n")

    def say(self, status: HTTPStatus, text: str) -> None:
        body = f"{text}\n".encode()
        self.begin(status, "text/plain; charset=utf-8", len(body))
        if self.command != "HEAD":
            self.wfile.write(body)

    def begin(self, status: HTTPStatus, kind: str, num_bytes: int | None) -> None:
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            **({} if num_bytes is None else {"Content-Length": str(num_bytes)}),
            "Cache-Control": "no-store",
            "Content-Security-Policy": live_page().policy,
            "Cross-Origin-Resource-Policy": "same-origin",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
            "X-Frame-Options": "DENY",
        }.items():
            self.send_header(name, value)
        if status is HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET, HEAD")
        self.end_headers()

    def refuse(self) -> None:
        self.say(HTTPStatus.METHOD_NOT_ALLOWED, "this page is read only")

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_TRACE = do_CONNECT = refuse  # noqa: N815

    def version_string(self) -> str:
        """Return no version: no page needs it."""
        return "fedtune"

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: the terminal shows the run."""


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def serve_live(feed: Feed, *, host: str = LOOPBACK, port: int | None = None) -> Iterator[LiveAddress]:
    """Serve a feed's page until the block ends, whose last changes the open pages still get.

    Args:
        feed: what the page shows.
        host: address to listen on; on any other than loopback a token is needed to see the page.
        port: to listen on; without it 8008, or the next one that is free.

    Raises:
        ConfigError: if that cannot be listened on.
    """
    server = listen(feed, host, port)
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.1}, name="fedtune live", daemon=True
    )
    thread.start()
    try:
        yield address_of(server, host)
    finally:
        feed.close()
        server.wait_until_idle(FAREWELL_S)
        server.shutdown()
        server.server_close()
        thread.join()


def listen(feed: Feed, host: str, port: int | None) -> LiveServer:
    token = "" if is_loopback(host) else secrets.token_urlsafe(24)
    ports = range(PORT, PORT + TRIES) if port is None else [port]
    for candidate in ports:
        try:
            return LiveServer((host, candidate), feed, token)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            if isinstance(error, socket.gaierror) or getattr(error, "errno", None) == errno.EADDRNOTAVAIL:
                hint = "choose one of its own, or 0.0.0.0 for all of them"
                expected, got = "an address of this machine, without a port", f"{host!r} ({reason})"
                raise ConfigError(Fault("--live-address", expected, got, hint)) from None
    got = f"{host}:{ports[0]}{f' to {ports[-1]}' if len(ports) > 1 else ''} ({reason})"
    raise ConfigError(Fault("--live", "an address that is free", got, "choose another with --live-port"))


def address_of(server: LiveServer, host: str) -> LiveAddress:
    """Return where to open the page, and what others see of it."""
    name = f"[{host}]" if ":" in host else host
    if not server.token:
        return LiveAddress(f"http://{name}:{server.server_port}/", server.server_port)
    if host in ("0.0.0.0", "::"):
        name = socket.gethostname()
    warning = (
        "the live page shows clients' names, losses and errors to all who have this address, unencrypted; on a network "
        "that others can listen to, leave --live-address out and use ssh -L"
    )
    url = f"http://{name}:{server.server_port}/?token={server.token}"
    return LiveAddress(url, server.server_port, warning)
