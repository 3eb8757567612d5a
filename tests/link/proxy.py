"""A TCP proxy with the faults of networks: cuts, delays, wrong bytes, and silence on open connections."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

BLOCK = 64 * 1024
Fault: TypeAlias = Literal["none", "cut", "delay", "flip", "silence"]


@dataclass(frozen=True)
class Fate:
    """The fault of a connection, and when it happens."""

    fault: Fault = "none"
    after: int = 0
    """Bytes in one direction before it happens."""
    up: bool = True
    """Whether the bytes from the client count, or those to it."""
    seconds: float = 0.0
    """Of each delay, or of the silence before the cut."""


@dataclass
class Proxy:
    """A running proxy; the fault of each connection is decided when it is accepted."""

    port: int
    target: int = 0
    """Port on loopback to which it connects."""
    pause_s: float = 0.0
    """Before each block is passed on."""
    fates: list[Fate] = field(default_factory=list)
    """Of the connections so far."""
    carried: list[int] = field(default_factory=lambda: [0, 0])
    """Bytes from clients and to them."""


@contextmanager
def proxy(fate: Callable[[int], Fate]) -> Iterator[Proxy]:
    """Run a proxy until the block ends; the caller sets its target, and `fate` returns the fault of each connection.

    It listens before the server does: a port that is chosen and released could be chosen again.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    made, over = Proxy(listener.getsockname()[1]), threading.Event()
    threads: list[threading.Thread] = []

    def accept() -> None:
        while not over.is_set():
            with suppress(OSError):
                client, _ = listener.accept()
                made.fates.append(fate(len(made.fates)))
                thread = threading.Thread(target=carry, args=(client, made.fates[-1]), daemon=True)
                thread.start()
                threads.append(thread)

    def carry(client: socket.socket, decided: Fate) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", made.target))
        except OSError:
            client.close()
            return
        broken = threading.Event()
        ways = [
            threading.Thread(target=pump, args=(source, sink, decided, up, broken), daemon=True)
            for source, sink, up in ((client, server, True), (server, client, False))
        ]
        for way in ways:
            way.start()
        for way in ways:
            way.join()
        client.close()
        server.close()

    def pump(source: socket.socket, sink: socket.socket, decided: Fate, up: bool, broken: threading.Event) -> None:
        passed = 0
        source.settimeout(0.2)
        while not over.is_set() and not broken.is_set():
            try:
                data = source.recv(BLOCK)
            except TimeoutError:
                continue
            except OSError:
                break
            if not data:
                break
            passed += len(data)
            made.carried[0 if up else 1] += len(data)
            if up == decided.up and passed > decided.after:
                if decided.fault == "cut":
                    break
                if decided.fault == "delay":
                    over.wait(decided.seconds)
                if decided.fault == "flip":
                    data = bytes([data[0] ^ 1]) + data[1:]
                if decided.fault == "silence":
                    broken.wait(decided.seconds)
                    break
            if made.pause_s:
                over.wait(made.pause_s)
            try:
                sink.sendall(data)
            except OSError:
                break
        broken.set()
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    acceptor = threading.Thread(target=accept, daemon=True)
    acceptor.start()
    try:
        yield made
    finally:
        over.set()
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for thread in threads:
            thread.join()
