"""HTTP/2 by hand: whether the far end of a TLS connection opens it, or what answers in its place."""

from __future__ import annotations

import re
import ssl
import time

from fedtune.link.client.http_proxy import RouteError, first_text
from fedtune.link.rejections import one_line

PROTOCOL = "h2"
FRAME_BYTES = 9
SETTINGS, GOAWAY = 4, 7
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, SETTINGS, 0, 0, 0, 0, 0))
"""With which a client begins, and settings that change nothing (RFC 9113, section 3.4)."""
MAX_SETTINGS_BYTES = 16 * 1024
SUPERLINK = (
    "ask your network team to let HTTP/2 pass there unopened, or use a SuperLink, which works over HTTP/1.1 "
    "(docs/how-to/superlink.md)"
)


def check_protocol(agreed: str | None, address: str) -> None:
    """Accept a TLS connection whose ends have agreed on HTTP/2.

    Raises:
        RouteError: if they have not.
    """
    if agreed == PROTOCOL:
        return
    got = (
        f"TLS at {address} agrees on {one_line(agreed, longest=20)}"
        if agreed
        else f"TLS at {address} agrees on no protocol"
    )
    raise RouteError(f"{got} where fedtune offers HTTP/2, so something on the way ends it; {SUPERLINK}")


def expect_settings(tls: ssl.SSLSocket, begun: bytes, address: str, *, timeout_s: float) -> None:
    """Open HTTP/2, and read the frame with which its far end must begin.

    Args:
        tls: the connection.
        begun: what has come on it already; servers may begin before the client does.
        address: of the server, for messages.
        timeout_s: for all of it.

    Raises:
        RouteError: if something else comes, or nothing.
    """
    until, data = time.monotonic() + timeout_s, begun
    try:
        tls.sendall(PREFACE)
        while len(data) < FRAME_BYTES:
            tls.settimeout(max(0.001, until - time.monotonic()))
            if not (more := tls.recv(4096)):
                break
            data += more
    except TimeoutError:
        raise RouteError(f"nothing at {address} answers the beginning of HTTP/2; {SUPERLINK}") from None
    except OSError as error:
        if not data:
            reason = error.strerror or str(error)
            raise RouteError(
                f"the connection to {address} is cut where HTTP/2 begins ({reason}); {SUPERLINK}"
            ) from None
    check_frame(data, address)


def check_frame(data: bytes, address: str) -> None:
    """Accept the beginning of a frame of settings.

    Raises:
        RouteError: for anything else.
    """
    if not data:
        raise RouteError(f"the connection to {address} is cut where HTTP/2 begins; {SUPERLINK}")
    if data.startswith(b"HTTP/"):
        status = one_line(re.split(rb"[\r\n]", data)[0][:60].decode("latin-1"))
        raise RouteError(
            f"{address} answers HTTP/2 with {status!r}, so something on the way speaks HTTP/1.1 only; {SUPERLINK}"
        )
    length, kind, stream = int.from_bytes(data[:3], "big"), data[3:4], data[5:FRAME_BYTES]
    if len(data) < FRAME_BYTES or kind != bytes([SETTINGS]) or length > MAX_SETTINGS_BYTES or any(stream):
        what = (
            "asks to go away"
            if kind == bytes([GOAWAY]) and len(data) >= FRAME_BYTES
            else f"answers HTTP/2 with {first_text(data)}"
        )
        raise RouteError(f"{address} {what}; check that link.address is a fedtune server's")
