"""Connections to a server as gRPC opens them, up to the end of the TLS handshake, and what it means if one fails."""

from __future__ import annotations

import socket
import ssl
from contextlib import suppress
from dataclasses import dataclass

from fedtune.link.client.channel import host_of
from fedtune.link.client.http2 import PROTOCOL, SUPERLINK
from fedtune.link.client.http_proxy import HttpProxy, RouteError, bracketed_host, open_tunnel, parse_proxy
from fedtune.link.pki.certificates import ShownNames, shown_names
from fedtune.link.pki.identity import Identity
from fedtune.link.rejections import one_line
from fedtune.link.settings import JoinSettings

CONNECT_S = 10.0
SILENCE_S = 1.0
"""After a TLS handshake, within which a server that rejects the client's certificate closes the connection."""
OUTDATED = frozenset({9, 10})
"""X509_V_ERR_CERT_NOT_YET_VALID and X509_V_ERR_CERT_HAS_EXPIRED: what a renewal at the server mends."""
OTHER_HOST = frozenset({62, 64})
"""X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH."""
REJECTIONS = ("CERTIFICATE", "UNKNOWN_CA", "ACCESS_DENIED", "DECRYPT_ERROR")
"""In the names of TLS alerts that are about this site's certificate."""


@dataclass(frozen=True)
class Route:
    """Where a client's connections lead."""

    host: str
    port: int
    server_name: str
    """Expected in the server's certificate."""
    proxy: HttpProxy | None

    @property
    def address(self) -> str:
        return f"{bracketed_host(self.host)}:{self.port}"

    @property
    def first(self) -> tuple[str, int]:
        """Host and port that the client itself connects to."""
        return (self.host, self.port) if self.proxy is None else (self.proxy.host, self.proxy.port)


def route_of(settings: JoinSettings) -> Route:
    """Return where the connections of a site lead, whose proxy is settled.

    Raises:
        ConfigError: if its proxy is malformed.
    """
    host, port = host_of(settings.address), int(settings.address.rpartition(":")[2])
    return Route(host, port, settings.server_name or host, parse_proxy(settings.proxy) if settings.proxy else None)


def connect(route: Route) -> socket.socket:
    """Return a connection to the first host on the way.

    Raises:
        RouteError: if there is none.
    """
    host, port = route.first
    where = route.address if route.proxy is None else route.proxy.label
    try:
        return socket.create_connection((host, port), timeout=CONNECT_S)
    except TimeoutError:
        hint = f"ask your network team, or {'name its proxy as' if route.proxy is None else 'check'} link.proxy"
        reason = f"{where} does not answer within {CONNECT_S:.0f} s, as where a firewall drops it; {hint}"
        raise RouteError(reason) from None
    except OSError as error:
        kind, check = ("server", "") if route.proxy is None else ("proxy", "; check link.proxy")
        raise RouteError(f"no {kind} listens on {where} ({error.strerror or error}){check}") from None


def shake_hands(connection: socket.socket, route: Route, identity: Identity | None) -> ssl.SSLSocket:
    """Return a connection after a TLS handshake as gRPC makes it.

    Raises:
        RouteError: if it fails.
    """
    context = ssl.create_default_context(cadata=identity.ca.decode()) if identity is not None else unverified_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    if identity is not None:
        context.load_cert_chain(identity.folder / "tls.crt", identity.folder / "tls.key")
    # gRPC refuses a handshake that does not offer HTTP/2, and this one would fail where a real call succeeds.
    context.set_alpn_protocols([PROTOCOL])
    try:
        return context.wrap_socket(connection, server_hostname=route.server_name)
    except ssl.SSLCertVerificationError as error:
        raise other_certificate(error, route) from None
    except TimeoutError:
        raise RouteError(f"TLS failed: {route.address} does not answer within {CONNECT_S:.0f} s") from None
    except (ssl.SSLEOFError, ConnectionError) as error:
        raise cut(error, route) from None
    except ssl.SSLError as error:
        name = error.reason or str(error)
        if "NO_APPLICATION_PROTOCOL" in name:
            raise RouteError(f"TLS at {route.address} refuses HTTP/2; {SUPERLINK}") from None
        if "VERSION" in name or "PROTOCOL" in name:
            hint = "check link.address; if it is right, something on the way ends TLS, or speaks none of version 1.3"
            raise RouteError(f"TLS failed: {route.address} answers otherwise ({name}); {hint}") from None
        raise RouteError(f"TLS failed ({name})") from None
    except OSError as error:
        raise RouteError(f"the connection broke off ({error.strerror or error})") from None


def unverified_context() -> ssl.SSLContext:
    """Return a context that takes any certificate: to look at it, never to send anything of this site."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return context


def first_bytes(tls: ssl.SSLSocket) -> bytes:
    """Return what a server sends of itself after the handshake; nothing if it waits for us.

    In TLS 1.3 the server verifies our certificate after the handshake has succeeded here: the end of the connection is
    all that a rejected client sees.

    Raises:
        RouteError: if it ends the connection.
        ssl.SSLError: if it says why.
    """
    tls.settimeout(SILENCE_S)
    try:
        if data := tls.recv(4096):
            return data
    except TimeoutError:
        return b""
    except ssl.SSLError as error:
        if not isinstance(error, ssl.SSLEOFError):
            raise
    except OSError as error:
        raise RouteError(f"the connection broke off ({error.strerror or error})") from None
    raise RouteError(
        "the server closed the connection: it rejects this site's certificate, or has too many connections; "
        "check that both were enrolled by the same CA"
    )  # not permanent: a network may cut here too


def rejection(error: ssl.SSLError) -> RouteError:
    """Return what a server's alert after the handshake means, which mostly is about this site's certificate."""
    if not any(word in (error.reason or "") for word in REJECTIONS):
        return RouteError(f"TLS failed ({error.reason or error})")
    why = (error.reason or "").lower().replace("_", " ")
    reason = (
        f"the server rejects this site's certificate ({why}); "
        "check that both were enrolled by the same CA and that the dates are right"
    )
    return RouteError(reason, permanent=True)


def other_certificate(error: ssl.SSLCertVerificationError, route: Route) -> RouteError:
    """Return what a certificate means that is not the one of the federation's server, with who has issued it."""
    if error.verify_code in OUTDATED:
        reason = f"the server's certificate is not valid now ({error.verify_message}); its coordinator must renew it"
        return RouteError(f"{reason}, or check this clock")
    expected = f"expected a server certificate of this federation for {route.server_name!r}"
    names = seen_names(route)
    if error.verify_code in OTHER_HOST:
        got = f"one for {', '.join(names.hosts[:4]) or 'no host'} ({error.verify_message})"
        hint = "check link.address, or set link.server_name to a name in the certificate"
        return RouteError(f"{expected}; got {got}; {hint}", permanent=True)
    if names.is_party:
        got = f"one of another federation, by {names.issuer} ({error.verify_message})"
        return RouteError(f"{expected}; got {got}; check link.address", permanent=True)
    return foreign(names, route, expected=expected, why=f" ({error.verify_message})")


def foreign(
    names: ShownNames, route: Route, *, expected: str = "expected a server certificate of a federation", why: str = ""
) -> RouteError:
    """Return what a certificate means that is no federation's."""
    hint = (
        f"a proxy on the way opens TLS, so ask your network team to exempt {route.address} from inspection, "
        "or link.address is another server's"
    )
    return RouteError(f"{expected}; got one by {names.issuer}{why}; {hint}", permanent=True)


def seen_names(route: Route) -> ShownNames:
    """Return what the certificate says that a route shows; Python hides one that it does not trust."""
    with suppress(RouteError, OSError), again(route, unverified_context()) as tls:
        return printable_names(tls.getpeercert(binary_form=True) or b"")
    return ShownNames("an issuer that could not be seen")


def printable_names(der: bytes) -> ShownNames:
    """Return what a certificate says of itself in a form that a log can hold."""
    try:
        names = shown_names(der)
    except ValueError:
        return ShownNames("an issuer that cannot be read")
    hosts = [one_line(host, longest=80) for host in names.hosts]
    return ShownNames(one_line(names.issuer, longest=120), hosts, names.is_party)


def cut(error: OSError, route: Route) -> RouteError:
    """Return why a TLS handshake was cut: for what it offers, if one that offers no HTTP/2 goes through."""
    reason = error.strerror or str(error)
    with suppress(RouteError, OSError), again(route, unverified_context()):
        return RouteError(f"something on the way to {route.address} cuts TLS that offers HTTP/2; {SUPERLINK}")
    return RouteError(f"TLS failed: the connection to {route.address} is cut ({reason}); ask your network team")


def open_way(route: Route) -> socket.socket:
    """Return a connection to the server of a route, through its proxy if it has one.

    Raises:
        RouteError: if there is none.
    """
    connection = connect(route)
    try:
        if route.proxy is not None:
            open_tunnel(connection, route.proxy, route.address, timeout_s=CONNECT_S)
    except RouteError:
        connection.close()
        raise
    return connection


def again(route: Route, context: ssl.SSLContext) -> ssl.SSLSocket:
    """Return another connection to the server of a route, after a handshake that shows nothing of this site.

    Raises:
        RouteError: if there is none.
        OSError: if the handshake fails.
    """
    connection = open_way(route)
    try:
        return context.wrap_socket(connection, server_hostname=route.server_name)
    except OSError:
        connection.close()
        raise
