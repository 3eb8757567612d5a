"""Bytes on a client's connections as the kernel counts them: with TLS and gRPC, without the headers of TCP and IP."""

from __future__ import annotations

import os
import socket
import struct
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from fedtune.link.settings import JoinSettings

DESCRIPTORS = Path("/proc/self/fd")
LENGTH = 208
RECEIVED_AT, SENT_AT = 128, 200
"""Places of tcpi_bytes_received and tcpi_bytes_sent in the kernel's struct tcp_info, from Linux 4.19 on; what was sent
twice counts twice."""
Counts: TypeAlias = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class SocketBytes:
    """Bytes of all connections to a server so far."""

    up: int = 0
    down: int = 0

    def __sub__(self, earlier: SocketBytes) -> SocketBytes:
        return SocketBytes(self.up - earlier.up, self.down - earlier.down)


def dialled_port(settings: JoinSettings) -> int:
    """Return the port that a client's connections lead to: the server's, or its proxy's; 0 if it names none."""
    address = settings.proxy.rstrip("/") or settings.address
    port = address.rpartition(":")[2]
    return int(port) if port.isdecimal() else 0


def open_connections(port: int) -> Counts | None:
    """Return the bytes sent and received by each connection of this process to a port; None where no kernel says so."""
    if not sys.platform.startswith("linux"):
        return None
    counts = {}
    # gRPC does not give its sockets away; those of a process lead here, whatever has opened them.
    with suppress(OSError):
        for name in os.listdir(DESCRIPTORS):
            with suppress(OSError):  # it may be closed meanwhile
                link = os.readlink(DESCRIPTORS / name)
                if link.startswith("socket:") and (moved := read_counts(int(name), port)) is not None:
                    counts[link] = moved
    return counts


def read_counts(descriptor: int, port: int) -> tuple[int, int] | None:
    """Return the bytes sent and received by a TCP connection to a port; None for any other descriptor.

    Raises:
        OSError: if it is no connected socket.
    """
    with socket.socket(fileno=os.dup(descriptor)) as copy:
        if copy.type != socket.SOCK_STREAM or copy.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        if copy.getpeername()[1] != port:
            return None
        info = copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, LENGTH)
    # Shorter on kernels before 4.19.
    if len(info) < LENGTH:
        return None
    (received,), (sent,) = struct.unpack_from("=Q", info, RECEIVED_AT), struct.unpack_from("=Q", info, SENT_AT)
    return sent, received


class SocketMeter:
    """Adds up the bytes of a client's connections, also of those that have been closed since the last look."""

    def __init__(self, port: int) -> None:
        """Begin at nothing; `port` is where the connections lead to."""
        self._port, self._lock = port, threading.Lock()
        self._open: Counts = {}
        self._closed = SocketBytes()

    def read(self) -> SocketBytes | None:
        """Return the bytes so far; None where the system does not count them.

        What a connection has moved between the last look and its end is not in it.
        """
        with self._lock:
            now = open_connections(self._port)
            if now is None:
                return None
            for name, (sent, received) in self._open.items():
                # The number of a closed socket may be given again, to one that begins at nothing.
                if name not in now or now[name][0] < sent or now[name][1] < received:
                    self._closed = SocketBytes(self._closed.up + sent, self._closed.down + received)
            self._open = now
            up = self._closed.up + sum(sent for sent, _ in now.values())
            return SocketBytes(up, self._closed.down + sum(received for _, received in now.values()))
