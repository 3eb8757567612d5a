"""The server of the link: gRPC with mutual TLS over a hub, in a thread of its own, from its start to its last byte."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from fedtune.errors import ConfigError, Fault
from fedtune.link import ENVIRONMENT, SET_IN_TIME
from fedtune.link.audit_log import RecordEvent, silent
from fedtune.link.pki.identity import Identity
from fedtune.link.pki.roster import RosterFile
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.link.server.service import Service, handlers
from fedtune.link.settings import MIB, LinkSettings
from fedtune.wire.v1 import link_pb2 as pb

LARGEST_PORT = 65_535
RETRY_AFTER_S = 2.0
"""What clients are told of a server that goes down and comes back."""


def options(settings: LinkSettings, *, members: int) -> list[tuple[str, int | str]]:
    """Return gRPC's own limits: they hold before a byte of a call is kept."""
    return [
        ("grpc.so_reuseport", 0),  # a second server on the port is an error, not half of the clients
        ("grpc.max_receive_message_length", MIB),
        ("grpc.max_send_message_length", 2 * MIB),
        ("grpc.max_metadata_size", 8 * 1024),
        ("grpc.max_concurrent_streams", 16),
        ("grpc.max_allowed_incoming_connections", 2 * members + 16),
        ("grpc.server_handshake_timeout_ms", 5000),
        ("grpc.compression_enabled_algorithms_bitset", 1),  # nothing is inflated
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),  # else the clients' pings end the connection
        ("grpc.http2.max_ping_strikes", 0),
    ]


def credentials(identity: Identity) -> grpc.ServerCredentials:
    """Return the server's half of mutual TLS; a renewed certificate in the folder serves the next connection."""
    folder: Path = identity.folder

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = ((folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes())
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=identity.ca)

    seen = [(folder / "tls.crt").stat().st_mtime_ns]

    def renewed() -> Any:  # a configuration, or None for the one before; gRPC's stubs do not know the second
        try:
            found = (folder / "tls.crt").stat().st_mtime_ns
            if found == seen[0]:
                return None
            made = configuration()
        except OSError:  # while it is being replaced: the one before serves
            return None
        seen[0] = found
        return made

    return grpc.dynamic_ssl_server_credentials(configuration(), renewed, require_client_authentication=True)


class RunningServer:
    """A server that runs; `port` is where it listens."""

    def __init__(self, hub: Dispatcher, service: Service, server: grpc.aio.Server, port: int) -> None:
        self.hub, self.service, self.port, self._server = hub, service, port, server
        self.done = asyncio.Event()

    async def drained(self, seconds: float) -> None:
        """Wait until no transfer is under way and every client knows of the end, or so long; then close everything."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + seconds
        while (self.service.transfers or self.hub.untold()) and loop.time() < ends:
            await asyncio.sleep(0.02)
        await self._server.stop(grace=min(1.0, seconds))
        self.service.close()


@contextmanager
def serve_link(
    hub: Dispatcher,
    identity: Identity,
    roster: RosterFile,
    *,
    tell: RecordEvent = silent,
    now: Callable[[], float] = time.time,
) -> Iterator[RunningServer]:
    """Serve a hub until the block ends; then clients are told that the server goes down, unless the run has finished.

    Raises:
        ConfigError: if the address cannot be listened on.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, RunningServer]] = Future()

    async def run() -> None:
        try:
            running = await start(hub, identity, roster, tell=tell, now=now)
        except ConfigError as error:
            started.set_exception(error)
            return
        started.set_result((asyncio.get_running_loop(), running))
        await running.done.wait()
        await running.drained(hub.settings.drain_s)

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="fedtune link", daemon=True)
    thread.start()
    loop, running = started.result()
    tell("listening", address=hub.settings.listen, port=running.port)
    try:
        yield running
    finally:
        if hub.stopping is None:
            hub.stop(pb.Stop.DRAINING, retry_after_s=RETRY_AFTER_S)
        loop.call_soon_threadsafe(running.done.set)
        thread.join()
        tell("stopped")


def check_cipher_suites(set_in_time: bool) -> None:
    """Refuse to serve in a process whose gRPC may not know that only TLS 1.3 is allowed.

    Raises:
        ConfigError: if gRPC was loaded before `fedtune.link` set GRPC_SSL_CIPHER_SUITES.
    """
    if not set_in_time:
        suites = f"GRPC_SSL_CIPHER_SUITES={ENVIRONMENT['GRPC_SSL_CIPHER_SUITES']}"
        hint = f"import fedtune.link before grpc or flwr, or start the process with {suites}"
        raise ConfigError(Fault("", "TLS 1.3 alone", "a process that loaded grpc before it could be set", hint))


def check_address(address: str) -> None:
    """Refuse a port that does not exist: gRPC would listen on another one in its place.

    Raises:
        ConfigError: if it is none.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > LARGEST_PORT:
        raise ConfigError(Fault("link.listen", f"HOST:PORT, a port of at most {LARGEST_PORT}", repr(address)))


async def start(
    hub: Dispatcher, identity: Identity, roster: RosterFile, *, tell: RecordEvent, now: Callable[[], float]
) -> RunningServer:
    """Start the gRPC server in the running loop.

    Raises:
        ConfigError: if the address cannot be listened on, or older versions of TLS cannot be excluded.
    """
    check_cipher_suites(SET_IN_TIME)
    check_address(hub.settings.listen)
    service = Service(hub, roster, epoch=secrets.randbits(63), tell=tell, now=now)
    server = grpc.aio.server(options=options(hub.settings, members=len(roster.current().members)))
    server.add_generic_rpc_handlers((handlers(service),))
    address = hub.settings.listen
    try:
        port = server.add_secure_port(address, credentials(identity))
    except RuntimeError:
        port = 0
    if not port:
        service.close()
        hint = "choose another port with --listen, or end the server that has it"
        raise ConfigError(Fault("link.listen", "an address that is free", repr(address), hint))
    await server.start()
    return RunningServer(hub, service, server, port)
