"""What stands between a site and its server in institutions: HTTP proxies, and boxes that open, cut or answer TLS."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

Behaviour: TypeAlias = Callable[[socket.socket], None]
"""What is done with a connection; its end closes it."""
ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"


@dataclass
class Box:
    """A program that listens on loopback."""

    port: int
    sockets: list[socket.socket] = field(default_factory=list)
    heads: list[bytes] = field(default_factory=list)
    """Of the requests that a proxy has had."""
    over: threading.Event = field(default_factory=threading.Event)


@contextmanager
def listening(behaviour: Callable[[Box], Behaviour]) -> Iterator[Box]:
    """Run a program until the block ends, which cuts its connections."""
    listener = socket.create_server(("127.0.0.1", 0))
    box, threads = Box(listener.getsockname()[1]), list[threading.Thread]()
    behave = behaviour(box)

    def serve(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            behave(connection)

    def accept() -> None:
        with suppress(OSError):
            while not box.over.is_set():
                connection, _ = listener.accept()
                box.sockets.append(connection)
                thread = threading.Thread(target=serve, args=(connection,), daemon=True)
                thread.start()
                threads.append(thread)

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield box
    finally:
        box.over.set()
        for one in (listener, *box.sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        listener.close()
        for thread in (acceptor, *threads):
            thread.join()


def saying(answer: bytes) -> Callable[[Box], Behaviour]:
    """Return a program that answers the first bytes of each connection, and closes it."""

    def behaviour(box: Box) -> Behaviour:
        def behave(connection: socket.socket) -> None:
            connection.recv(4096)
            connection.sendall(answer)

        return behave

    return behaviour


def streaming(block: bytes, first: bytes = b"", *, pause_s: float = 0.0) -> Callable[[Box], Behaviour]:
    """Return a program that answers without end."""

    def behaviour(box: Box) -> Behaviour:
        def behave(connection: socket.socket) -> None:
            connection.recv(4096)
            connection.sendall(first)
            while not box.over.wait(pause_s):
                connection.sendall(block)

        return behave

    return behaviour


def silent(box: Box) -> Behaviour:
    """Accept connections, and do nothing with them."""
    return lambda connection: (box.over.wait(), None)[1]


def proxying(login: str = "", *, schemes: str = "Basic realm=x") -> Callable[[Box], Behaviour]:
    """Return an HTTP proxy that carries what CONNECT asks for; with a login (USER:PASSWORD), for that one alone."""
    expected = b"Proxy-Authorization: Basic " + base64.b64encode(login.encode())

    def behaviour(box: Box) -> Behaviour:
        def behave(client: socket.socket) -> None:
            head = b""
            while b"\r\n\r\n" not in head:
                if not (data := client.recv(4096)):
                    return
                head += data
            box.heads.append(head)
            if login and expected not in head.split(b"\r\n"):
                refusal = f"HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: {schemes}\r\n\r\n"
                client.sendall(refusal.encode())
                return
            host, _, port = head.split()[1].decode().rpartition(":")
            with socket.create_connection((host.strip("[]"), int(port))) as server:
                box.sockets.append(server)
                client.sendall(ESTABLISHED)
                carry(client, server)

        return behave

    return behaviour


def carry(client: socket.socket, server: socket.socket) -> None:
    """Pass on what either side sends, until one of them ends."""

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    back = threading.Thread(target=pump, args=(server, client), daemon=True)
    back.start()
    pump(client, server)
    back.join()


def hating_http2(target: int) -> Callable[[Box], Behaviour]:
    """Return a box that cuts every TLS handshake that offers HTTP/2, and carries the others to a port."""

    def behaviour(box: Box) -> Behaviour:
        def behave(client: socket.socket) -> None:
            hello = client.recv(65536)
            if b"\x02h2" in hello:
                return
            with socket.create_connection(("127.0.0.1", target)) as server:
                box.sockets.append(server)
                server.sendall(hello)
                carry(client, server)

        return behave

    return behaviour


def ending_tls(
    chain: Path, key: Path, *, protocols: tuple[str, ...] = (), then: Behaviour = lambda tls: None, old: bool = False
) -> Callable[[Box], Behaviour]:
    """Return a program that takes TLS connections with a certificate, agrees on a protocol, and goes on as `then`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)
    if old:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    if protocols:
        context.set_alpn_protocols(list(protocols))

    def behaviour(box: Box) -> Behaviour:
        def behave(connection: socket.socket) -> None:
            with context.wrap_socket(connection, server_side=True) as tls:
                box.sockets.append(tls)
                then(tls)

        return behave

    return behaviour


def own_certificate(folder: Path, issuer: str) -> tuple[Path, Path]:
    """Return files with a certificate for localhost, as a proxy that opens TLS issues it, and its key."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)])
    certificate = (
        x509.CertificateBuilder(name, x509.Name([]), key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    (folder / "box.key").write_bytes(key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain))
    (folder / "box.crt").write_bytes(certificate.public_bytes(encoding))
    return folder / "box.crt", folder / "box.key"
