"""The way from a client to its server, step by step: name, port, proxy, TLS, HTTP/2; and which of them fails."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, TypeAlias

from fedtune.link.client.handshake import (
    CONNECT_S,
    Route,
    connect,
    first_bytes,
    foreign,
    open_way,
    printable_names,
    rejection,
    route_of,
    shake_hands,
)
from fedtune.link.client.http2 import check_protocol, expect_settings
from fedtune.link.client.http_proxy import RouteError, bracketed_host, open_tunnel
from fedtune.link.pki.identity import Identity
from fedtune.link.rejections import one_line
from fedtune.link.settings import JoinSettings

StepName: TypeAlias = Literal["name", "port", "proxy", "TLS", "HTTP/2"]


@dataclass(frozen=True)
class Step:
    """How one step on the way to the server went."""

    name: StepName
    text: str
    ok: bool = True
    permanent: bool = False
    """Of a step that failed: whether trying again cannot help."""
    seconds: float = 0.0


@dataclass(frozen=True)
class Diagnosis:
    """Why there is no connection."""

    reason: str
    permanent: bool
    """Whether trying again cannot help."""


def diagnose(identity: Identity, settings: JoinSettings) -> Diagnosis:
    """Return which step to the server fails.

    gRPC reports a closed port and a rejected certificate with the same status, so this opens a connection of its own.
    """
    for step in walk(identity, settings):
        if not step.ok:
            return Diagnosis(step.text, step.permanent)
    return Diagnosis("TLS and HTTP/2 succeed, but the server does not answer calls", permanent=False)


def proxy_fault(settings: JoinSettings) -> Diagnosis | None:
    """Return why the proxy of a site does not lead to its server; None if it does, or there is none.

    For gRPC, which reads a proxy's answer for seconds without a limit: one that never ends took 700 MiB.
    """
    if not settings.proxy:
        return None
    try:
        open_way(route_of(settings)).close()
    except RouteError as error:
        return Diagnosis(error.reason, error.permanent)
    return None


def walk(identity: Identity | None, settings: JoinSettings) -> Iterator[Step]:
    """Yield how each step to the server goes, up to the first that fails; nothing is sent but what opens a connection.

    Args:
        identity: of the client; without one it is not sure whose certificate the server shows.
        settings: address and proxy; that must be settled.
    """
    route = route_of(settings)
    with ExitStack() as stack:
        walked = Walk(route, identity, stack)
        steps: list[tuple[StepName, Callable[[], str]]] = [
            ("name", walked.look_up),
            ("port", walked.connect),
            ("TLS", walked.shake_hands),
            ("HTTP/2", walked.open),
        ]
        if route.proxy is not None:
            steps.insert(2, ("proxy", walked.tunnel))
        for name, take in steps:
            began = time.monotonic()
            try:
                text = take()
            except RouteError as error:
                yield Step(name, error.reason, ok=False, permanent=error.permanent, seconds=time.monotonic() - began)
                return
            yield Step(name, text, seconds=time.monotonic() - began)


class Walk:
    """A connection that is opened step by step; every step returns what it has seen, or raises RouteError."""

    def __init__(self, route: Route, identity: Identity | None, stack: ExitStack) -> None:
        """Begin before the first step; `stack` closes what is opened."""
        self._route, self._identity, self._stack = route, identity, stack
        self._connection: socket.socket
        self._tls: ssl.SSLSocket
        self._agreed: str | None = None
        self._begun = b""  # what the server has sent of itself after the handshake

    def look_up(self) -> str:
        """Ask for the addresses of the first host."""
        host, port = self._route.first
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:  # UnicodeError: a label of more than 63 characters
            key = "link.address" if self._route.proxy is None else "link.proxy"
            reason = getattr(error, "strerror", None) or str(error)
            raise RouteError(f"expected a host that is known; got {host!r} ({reason}); check {key}") from None
        return f"{host} is {', '.join(dict.fromkeys(str(entry[4][0]) for entry in entries))}"

    def connect(self) -> str:
        """Connect to the first port."""
        self._connection = self._stack.enter_context(connect(self._route))
        host, port = self._connection.getpeername()[:2]
        return f"{bracketed_host(host)}:{port} accepts connections"

    def tunnel(self) -> str:
        """Have the proxy connect on."""
        assert self._route.proxy is not None
        open_tunnel(self._connection, self._route.proxy, self._route.address, timeout_s=CONNECT_S)
        login = f" for {one_line(self._route.proxy.user)!r}" if self._route.proxy.user else ""
        return f"{self._route.proxy.label} connects to {self._route.address}{login}"

    def shake_hands(self) -> str:
        """Begin TLS, and wait for what a server does that rejects this site's certificate."""
        self._tls = self._stack.enter_context(shake_hands(self._connection, self._route, self._identity))
        names = printable_names(self._tls.getpeercert(binary_form=True) or b"")
        if self._identity is None and not names.is_party:
            raise foreign(names, self._route)
        version, self._agreed = self._tls.version(), self._tls.selected_alpn_protocol()
        try:
            self._begun = first_bytes(self._tls)
        except (RouteError, ssl.SSLError) as error:
            # Without a certificate of its own a site is not let in; what it came for has been seen.
            if self._identity is not None:
                raise error if isinstance(error, RouteError) else rejection(error) from None
        verified = "verified" if self._identity is not None else "not verified without an identity"
        hosts = ", ".join(names.hosts[:4]) or "no host"
        return f"{version}, certificate for {hosts} by {names.issuer}, {verified}"

    def open(self) -> str:
        """Begin HTTP/2."""
        check_protocol(self._agreed, self._route.address)
        if self._identity is None and not self._begun:
            return "both ends agree on it; its frames are read once this site has an identity"
        expect_settings(self._tls, self._begun, self._route.address, timeout_s=CONNECT_S)
        return "both ends agree on it, and the server has sent its settings"
