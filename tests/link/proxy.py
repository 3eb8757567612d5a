"""A TCP proxy that does to connections what networks do: cuts, delays, wrong bytes, and silence with open ends."""

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
    """What becomes of a connection."""

    fault: Fault = "none"
    after: int = 0
    """Bytes in one direction, before it happens."""
    up: bool = True
    """Whether those from the client are meant."""
    seconds: float = 0.0
    """Of each delay, or until what was silent is cut."""


@dataclass
class Proxy:
    """A proxy that runs; how each connection fares is decided when it is made."""

    port: int
    target: int = 0
    """Port of loopback that it carries to."""
    pause_s: float = 0.0
    """Before each block is passed on."""
    fates: list[Fate] = field(default_factory=list)
    """Of the connections so far."""
    carried: list[int] = field(default_factory=lambda: [0, 0])
    """Bytes from clients and to them."""


@contextmanager
def proxy(fate: Callable[[int], Fate]) -> Iterator[Proxy]:
    """Give a proxy until the block ends, whose target is still to be set; `fate` is asked for each connection's.

    It has its port before the server is given one: a port that is drawn and let go may be drawn again.
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
