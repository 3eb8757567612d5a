"""The HTTP proxy of a site: where its address and password come from, and the tunnel that CONNECT opens through it."""

from __future__ import annotations

import base64
import ipaddress
import re
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from fedtune.errors import ConfigError, Fault, FedtuneError
from fedtune.link.rejections import one_line
from fedtune.link.settings import ENVIRONMENT_PROXY, JoinSettings

MAX_HEAD_BYTES = 16 * 1024
"""Of a proxy's response before its blank line; a program that answers without end is left there."""
MAX_CREDENTIALS_BYTES = 1024
FORM = "http://HOST:PORT"


class RouteError(FedtuneError):
    """A step to the server failed: why, and whether trying again cannot help."""

    def __init__(self, reason: str, *, permanent: bool = False) -> None:
        super().__init__(reason)
        self.reason, self.permanent = reason, permanent


@dataclass(frozen=True)
class HttpProxy:
    """An HTTP proxy, and what it asks to know."""

    host: str
    port: int
    user: str = ""
    # Neither in a repr nor in `label`: both reach logs.
    password: str = field(default="", repr=False)

    @property
    def label(self) -> str:
        """Its URL without user and password."""
        return f"http://{bracketed_host(self.host)}:{self.port}"

    @property
    def url(self) -> str:
        """Its URL with both, for gRPC."""
        login = f"{quote(self.user, safe='')}:{quote(self.password, safe='')}@" if self.user else ""
        return self.label.replace("://", f"://{login}", 1)


def bracketed_host(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def parse_proxy(text: str, *, key: str = "link.proxy") -> HttpProxy:
    """Return the proxy of a URL; one without a scheme, as environments have it, is taken for HTTP.

    >>> parse_proxy("http://anna:secret@proxy.example.org:3128/")
    HttpProxy(host='proxy.example.org', port=3128, user='anna')

    Raises:
        ConfigError: if it is none; the message does not repeat it, for a password may be in it.
    """
    scheme, mark, rest = text.strip().partition("://")
    if mark and scheme.lower() != "http":
        hint = "name the proxy's plain HTTP port; what passes through it is encrypted from end to end all the same"
        raise ConfigError(Fault(key, f"an HTTP proxy, {FORM}", f"one of the kind {one_line(scheme)!r}", hint))
    try:
        parts = urlsplit(f"http://{rest if mark else scheme}")
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        port, host = None, ""
    if not host or not port or parts.path.strip("/") or parts.query or not re.fullmatch(r"[A-Za-z0-9._:-]+", host):
        got = f"{one_line(host)!r} without a port" if host and port is None and "@" not in host else "something else"
        hint = "ask your network team for its address; special characters of a password are written as %XX"
        raise ConfigError(Fault(key, FORM, got, hint))
    return HttpProxy(host, port, unquote(parts.username or ""), unquote(parts.password or ""))


def settle_proxy(settings: JoinSettings, root: Path, environment: Mapping[str, str]) -> JoinSettings:
    """Return the settings with the proxy that they name written out: from the environment, and with its password.

    Args:
        settings: of a site's file.
        root: its folder.
        environment: of the process.

    Raises:
        ConfigError: if the proxy is malformed, or its password cannot be read.
    """
    if settings.proxy == ENVIRONMENT_PROXY:
        host, _, port = settings.address.rpartition(":")
        text = environment_proxy(environment, host.strip("[]"), port)
        proxy = parse_proxy(text, key="HTTPS_PROXY") if text else None
    else:
        proxy = parse_proxy(settings.proxy) if settings.proxy else None
    if settings.proxy_credentials and proxy is not None:
        user, password = read_credentials(root / settings.proxy_credentials)
        proxy = replace(proxy, user=user, password=password)
    return replace(settings, proxy="" if proxy is None else proxy.url)


def read_credentials(path: Path) -> tuple[str, str]:
    """Return user and password in a file, which its owner alone may read.

    Raises:
        ConfigError: if it is missing, open to others, or holds something else; the message does not repeat it.
    """
    key = "link.proxy_credentials"
    try:
        with path.open("rb") as file:
            text, mode = file.read(MAX_CREDENTIALS_BYTES + 1), path.stat().st_mode
    except OSError as error:
        raise ConfigError(Fault(key, f"a file {path} that can be read", error.strerror or str(error))) from None
    if mode & 0o077:
        raise ConfigError(
            Fault(key, f"a file that its owner alone can read at {path}", "one for others, too", "chmod 600 it")
        )
    with suppress(UnicodeDecodeError):
        user, colon, password = text.decode().rstrip("\r\n").partition(":")
        if user and colon and (user + password).isprintable() and len(text) <= MAX_CREDENTIALS_BYTES:
            return user, password
    raise ConfigError(Fault(key, f"one line USER:PASSWORD in {path}", "something else"))


def environment_proxy(environment: Mapping[str, str], host: str, port: str) -> str:
    """Return the proxy that HTTPS_PROXY names for a host, unless NO_PROXY leaves it out; empty without one.

    >>> proxies = {"HTTPS_PROXY": "proxy:3128", "NO_PROXY": "localhost, .example.org,10.0.0.0/8"}
    >>> [environment_proxy(proxies, host, "443") for host in ("fl.example.org", "10.1.2.3", "example.net")]
    ['', '', 'proxy:3128']
    """
    # The small spelling first, as in curl and Python's own urllib.
    proxy = environment.get("https_proxy") or environment.get("HTTPS_PROXY") or ""
    spared = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    return "" if any(is_spared(entry, host, port) for entry in re.split(r"[,\s]+", spared)) else proxy.strip()


def is_spared(entry: str, host: str, port: str) -> bool:
    """Return whether an entry of NO_PROXY is about a host: a name or its end, an address, a network, or all."""
    name, colon, only = entry.rpartition(":")
    if colon and only.isdecimal() and name.count(":") == 0:
        return only == port and is_spared(name, host, port)
    with suppress(ValueError):
        return ipaddress.ip_address(host) in ipaddress.ip_network(entry.strip("[]"), strict=False)
    if entry == "*":
        return True
    entry, host = entry.lower().removeprefix("*").lstrip("."), host.lower()
    return bool(entry) and f".{host}".endswith(f".{entry}")


def open_tunnel(connection: socket.socket, proxy: HttpProxy, target: str, *, timeout_s: float) -> None:
    """Have a proxy connect us to a host, over a connection to it.

    Args:
        connection: to the proxy.
        proxy: its name for messages, user and password.
        target: HOST:PORT.
        timeout_s: for all of it, however slowly the proxy sends.

    Raises:
        RouteError: if the proxy does not answer, or says no.
    """
    until = time.monotonic() + timeout_s
    try:
        connection.sendall(connect_request(proxy, target))
        head, rest = read_head(connection, proxy, until)
    except OSError as error:
        reason = error.strerror or str(error)
        raise RouteError(f"the proxy {proxy.label} broke the connection off ({reason})") from None
    check_response(head, proxy, target)
    if rest:
        raise RouteError(f"the proxy {proxy.label} sends {len(rest)} bytes that are not the server's")


def connect_request(proxy: HttpProxy, target: str) -> bytes:
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.user:
        login = base64.b64encode(f"{proxy.user}:{proxy.password}".encode()).decode()
        lines.append(f"Proxy-Authorization: Basic {login}")
    return "\r\n".join([*lines, "", ""]).encode()


def read_head(connection: socket.socket, proxy: HttpProxy, until: float) -> tuple[bytes, bytes]:
    """Return a response up to its blank line, and what came behind that; bounded in bytes and in time."""
    head = b""
    while b"\r\n\r\n" not in head:
        left_s = until - time.monotonic()
        if left_s <= 0:
            raise RouteError(f"the proxy {proxy.label} does not answer CONNECT in time; it sent {len(head)} bytes")
        connection.settimeout(left_s)
        try:
            data = connection.recv(4096)
        except TimeoutError:
            continue
        if not data:
            got = "without a word" if not head else f"in the middle of its answer ({first_text(head)})"
            raise RouteError(f"the proxy {proxy.label} closes the connection {got}; check link.proxy")
        head += data
        if not b"HTTP/1.".startswith(head[:7]):
            got = f"an answer that begins {first_text(head)}"
            raise RouteError(f"expected an HTTP proxy at {proxy.label}; got {got}; check link.proxy")
        if len(head) > MAX_HEAD_BYTES:
            limit = f"{MAX_HEAD_BYTES // 1024} KiB"
            raise RouteError(
                f"the proxy {proxy.label} answers with a header of more than {limit}; ask your network team"
            )
    head, _, rest = head.partition(b"\r\n\r\n")
    return head, rest


def first_text(data: bytes) -> str:
    """Return the first bytes from outside in a form that a log can hold."""
    return repr(data[:24].decode("ascii", "replace"))


def check_response(head: bytes, proxy: HttpProxy, target: str) -> None:
    """Accept a proxy's yes to CONNECT.

    Raises:
        RouteError: for anything else, with what it means and who can change it.
    """
    first, *lines = head.decode("latin-1").split("\r\n")
    status = re.fullmatch(r"HTTP/1\.[01] ([1-5]\d\d)(?: (.*))?", first)
    if status is None:
        raise RouteError(f"expected an HTTP proxy at {proxy.label}; got {one_line(first[:60])!r}; check link.proxy")
    code, phrase = int(status[1]), one_line((status[2] or "")[:60])
    if code == 200:
        return
    said = f"the proxy {proxy.label} answers {code}{f' ({phrase})' if phrase else ''}"
    if code == 407:
        # Repeated with a wrong password, it would lock the account out.
        raise RouteError(f"{said}: {password_advice(lines, proxy)}", permanent=True)
    if code in (502, 503, 504):
        raise RouteError(f"{said}: it does not reach {target}; check link.address, or the server is down")
    if code in (400, 405, 501):
        raise RouteError(f"{said}: it does not tunnel; ask your network team for a proxy that allows CONNECT")
    if 300 <= code < 400:
        raise RouteError(f"{said}: it sends this machine elsewhere, perhaps to log in; ask your network team")
    raise RouteError(
        f"{said}: it does not allow CONNECT to {target}; ask your network team to allow it, or use port 443"
    )


def password_advice(lines: list[str], proxy: HttpProxy) -> str:
    """Return what to do about a proxy that wants to know who asks, by the ways to log in that it offers."""
    offered = [
        one_line(value.strip().partition(" ")[0][:20])
        for line in lines
        for name, colon, value in [line.partition(":")]
        if colon and name.strip().lower() == "proxy-authenticate"
    ]
    if offered and not any(scheme.lower() == "basic" for scheme in offered):
        ways = ", ".join(dict.fromkeys(offered))
        hint = "run a local proxy that adds it, or ask for an exception"
        return f"it wants {ways}, and fedtune logs in with Basic alone; {hint}"
    if not proxy.user:
        return (
            "it wants a password; write USER:PASSWORD into a file with mode 600 and name it as link.proxy_credentials"
        )
    return (
        f"it rejects the password of {one_line(proxy.user)!r}; mend link.proxy_credentials before the account is locked"
    )
