"""Connections of the server's port that have not called yet, or are too many: closed before they keep others out.

gRPC owns the sockets, and counts a connection from its first packet on; it neither knows sources nor says who is
connected. So the process looks at its own descriptors, where Linux lists them, and shuts down what should go: gRPC
then sees the end of that connection. Where descriptors are not listed, gRPC's own limits are all there is.
"""

from __future__ import annotations

import ipaddress
import os
import resource
import socket
import stat
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

Peer: TypeAlias = tuple[str, int]
"""Address and port of the other end."""
DESCRIPTORS = Path("/proc/self/fd")
MOST_OF_MEMBER = 4
"""Connections of one member; the newest stay, since the oldest may have broken off unnoticed."""
SPARE_DESCRIPTORS = 256
"""For the run's own files, out of the process's limit."""
STRANGERS = 1024
"""Connections that have not called yet, of all sources together."""


@dataclass(frozen=True)
class Connection:
    """One connection of the port."""

    descriptor: int
    inode: int
    """Tells a connection from a later one with the same descriptor."""
    peer: Peer
    since: float
    client: str = ""
    """Name in its certificate; empty before its first call."""


def connection_limit(parties: int) -> int:
    """Return how many connections gRPC should take for a roster of so many parties."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    room = max(soft - SPARE_DESCRIPTORS, 0) if soft != resource.RLIM_INFINITY else STRANGERS * 64
    # Two for each party, one that ends beside one that begins, are the least with which the link can work.
    return max(2 * parties + 16, min(MOST_OF_MEMBER * parties + STRANGERS, room))


def source_of(address: str) -> str:
    """Return what counts as one source: an address, or of IPv6 its /64, which one line or machine has for itself."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, 64), strict=False))


def parse_peer(peer: str) -> Peer | None:
    """Return address and port from gRPC's name of a peer, such as `ipv4:192.0.2.1:5000`; None for any other."""
    family, _, rest = unquote(peer).partition(":")
    host, _, port = rest.rpartition(":")
    if family not in ("ipv4", "ipv6") or not port.isdecimal():
        return None
    return plain(host.strip("[]")), int(port)


def plain(address: str) -> str:
    """Return an address in one spelling; an IPv4 address within IPv6 as itself."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return str(mapped or parsed)


def superfluous(
    connections: Sequence[Connection], now: float, *, handshake_s: float, per_source: int, strangers: int
) -> Sequence[Connection]:
    """Return the connections to close.

    Args:
        connections: all of the port.
        now: on the clock of their `since`.
        handshake_s: within which a connection must have made its first call.
        per_source: connections of one source that may not have called yet; the newest stay.
        strangers: such connections of all sources together; those of the source with the most go first.
    """
    by_member, by_source = defaultdict[str, list[Connection]](list), defaultdict[str, list[Connection]](list)
    close = list[Connection]()
    # Newest first, so that the oldest, which had their time, are those beyond a limit.
    for connection in sorted(connections, key=lambda each: (each.since, each.descriptor), reverse=True):
        if connection.client:
            by_member[connection.client].append(connection)
        elif now - connection.since >= handshake_s:
            close.append(connection)
        else:
            by_source[source_of(connection.peer[0])].append(connection)
    for member in by_member.values():
        close += member[MOST_OF_MEMBER:]
    for source in by_source.values():
        close += source[per_source:]
        del source[per_source:]
    total = sum(len(source) for source in by_source.values())
    while total > strangers:
        close.append(max(by_source.values(), key=len).pop())
        total -= 1
    return close


class Connections:
    """The connections of one port; not thread-safe, the service's loop alone calls it."""

    def __init__(self, *, handshake_s: float, per_source: int, limit: int, clock: Callable[[], float]) -> None:
        """Begin without connections.

        Args:
            handshake_s: see `superfluous`.
            per_source: see `superfluous`.
            limit: connections that gRPC takes.
            clock: seconds from any start.
        """
        self._handshake_s, self._per_source, self._clock = handshake_s, per_source, clock
        # A quarter stays free for those that arrive between two looks.
        self._strangers = max(limit * 3 // 4, 1)
        self._known: Mapping[int, Connection] = {}  # by inode
        self._others = frozenset[int]()  # inodes of sockets that are none of the port
        self._names: dict[Peer, str] = {}

    def note_call(self, peer: str, client: str) -> None:
        """Note that a connection has made a call in a client's name."""
        if (parsed := parse_peer(peer)) is not None:
            self._names[parsed] = client

    def look(self, port: int) -> int:
        """Close what should go of the connections of a port; returns how many that were."""
        now, known, others = self._clock(), dict[int, Connection](), set[int]()
        for descriptor, inode in list_sockets():
            if (earlier := self._known.get(inode)) is not None:
                known[inode] = replace(earlier, descriptor=descriptor)
            elif inode in self._others or (peer := peer_of(descriptor, inode, port)) is None:
                others.add(inode)
            else:
                known[inode] = Connection(descriptor, inode, peer, now)
        known = {
            inode: replace(connection, client=self._names.get(connection.peer, ""))
            for inode, connection in known.items()
        }
        close = superfluous(
            list(known.values()),
            now,
            handshake_s=self._handshake_s,
            per_source=self._per_source,
            strangers=self._strangers,
        )
        for connection in close:
            shut(connection)
            del known[connection.inode]
        # Those that called between the list and here are in the next list.
        peers = {connection.peer for connection in known.values()}
        self._names = {peer: name for peer, name in self._names.items() if peer in peers}
        self._known, self._others = known, frozenset(others)
        return len(close)

    def close(self, peer: str) -> bool:
        """Close a connection, with every call on it; returns whether it was known."""
        parsed = parse_peer(peer)
        own = [connection for connection in self._known.values() if connection.peer == parsed]
        for connection in own:
            shut(connection)
        return bool(own)


def list_sockets() -> Iterator[tuple[int, int]]:
    """Yield descriptor and inode of every socket of this process."""
    try:
        names = os.listdir(DESCRIPTORS)
    except OSError:
        return
    for name in names:
        # A descriptor may be closed by another thread while the list is read.
        with suppress(OSError):
            status = os.fstat(int(name))
            if stat.S_ISSOCK(status.st_mode):
                yield int(name), status.st_ino


def peer_of(descriptor: int, inode: int, port: int) -> Peer | None:
    """Return the other end of a connection of a port; None if the descriptor is none."""
    with suppress(OSError), own_socket(descriptor, inode) as connection:
        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getsockname()[1] == port:
            host, number = connection.getpeername()[:2]
            return plain(host), number
    return None


def shut(connection: Connection) -> None:
    """Shut a connection down; nothing happens if it has ended."""
    with suppress(OSError), own_socket(connection.descriptor, connection.inode) as own:
        own.shutdown(socket.SHUT_RDWR)


def own_socket(descriptor: int, inode: int) -> socket.socket:
    """Return a socket of this process under a descriptor of our own, which no other thread can close or reuse.

    Raises:
        OSError: if the descriptor is that of something else by now.
    """
    copy = os.dup(descriptor)
    try:
        if os.fstat(copy).st_ino != inode:
            raise OSError("another file has the descriptor")
        return socket.socket(fileno=copy)
    except OSError:
        os.close(copy)
        raise
