"""The server of the link: gRPC with mutual TLS over a dispatcher, in a thread of its own."""

from __future__ import annotations

import asyncio
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
from fedtune.link.audit_log import RecordEvent, ignore_event
from fedtune.link.pki.identity import Identity
from fedtune.link.pki.roster import RosterFile
from fedtune.link.server.addresses import LISTEN_HINT, check_address
from fedtune.link.server.connections import connection_limit
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.link.server.service import Renew, Service, rpc_handlers
from fedtune.link.settings import MIB, LinkSettings
from fedtune.wire.v1 import link_pb2 as pb

RETRY_AFTER_S = 2.0
"""After which clients come back to a server that restarts."""
DRAIN_POLL_S = 0.02


def server_options(settings: LinkSettings, *, parties: int) -> list[tuple[str, int | str]]:
    """Return gRPC's own limits, which hold before our code sees a byte of a call."""
    return [
        # Else a second server on the port would be no error, and take half of the clients.
        ("grpc.so_reuseport", 0),
        # gRPC holds a message whole before we see it; the largest has 768 KiB of inline parts and a header of 64 KiB.
        ("grpc.max_receive_message_length", MIB),
        ("grpc.max_send_message_length", 2 * MIB),
        ("grpc.max_metadata_size", 8 * 1024),
        ("grpc.max_concurrent_streams", 16),
        # Counted from their first packet on, so a low number would keep members out; `Connections` closes strangers.
        ("grpc.max_allowed_incoming_connections", connection_limit(parties)),
        # gRPC's own limit would let a peer that connects and stays silent hold its place for two minutes.
        ("grpc.server_handshake_timeout_ms", int(1000 * settings.handshake_s)),
        # None but identity: a small compressed message must not inflate to a huge one.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # A held call has no traffic: without pings a proxy would cut it, and a client that has gone seem to be here.
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Without it the clients' own pings end the connection as too many.
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
    ]


def server_credentials(identity: Identity, roster: RosterFile | None) -> grpc.ServerCredentials:
    """Return the server's half of TLS; a renewed certificate in the folder serves the next connection.

    Args:
        identity: of the server.
        roster: names the registrar whose certificates clients may have, too; None: clients need no certificate.
    """
    folder: Path = identity.folder

    def configuration() -> grpc.ServerCertificateConfiguration:
        pair = ((folder / "tls.key").read_bytes(), (folder / "tls.crt").read_bytes())
        if roster is None:
            return grpc.ssl_server_certificate_configuration([pair])
        return grpc.ssl_server_certificate_configuration([pair], root_certificates=identity.ca + registrar())

    def registrar() -> bytes:
        # For clients alone: none of them trusts it, so no stolen key of a registrar makes a server.
        delegation = roster.current().delegation if roster is not None else None
        return delegation.ca if delegation is not None else b""

    loaded = (folder / "tls.crt").stat().st_mtime_ns, registrar()

    def reload() -> Any:  # None keeps the configuration before, which types-grpcio does not know
        nonlocal loaded
        try:
            newest = (folder / "tls.crt").stat().st_mtime_ns, registrar()
            if newest == loaded:
                return None
            renewed = configuration()
        # While the file is being replaced, the certificate before serves.
        except OSError:
            return None
        loaded = newest
        return renewed

    return grpc.dynamic_ssl_server_credentials(
        configuration(), reload, require_client_authentication=roster is not None
    )


class RunningServer:
    """A server that runs; `port` is where it listens."""

    def __init__(self, dispatcher: Dispatcher, service: Service, server: grpc.aio.Server, port: int) -> None:
        self.dispatcher, self.service, self.port, self._server = dispatcher, service, port, server
        self.done = asyncio.Event()
        self._watch = asyncio.create_task(service.watch(port))

    async def drain(self, seconds: float) -> None:
        """Wait until no transfer is under way and every client knows of the end, at most so long; then close all.

        At the end of a run it is so long since the last byte that a client fetched.
        """
        loop, sent = asyncio.get_running_loop(), self.service.fetched_bytes
        ends = loop.time() + seconds
        while (self.service.transfers or self.dispatcher.uninformed_clients()) and loop.time() < ends:
            await asyncio.sleep(DRAIN_POLL_S)
            # A download of the result goes on for as long as bytes flow, however slow the line is.
            if self.dispatcher.finished and self.service.fetched_bytes > sent:
                sent, ends = self.service.fetched_bytes, loop.time() + seconds
        self._watch.cancel()
        await self._server.stop(grace=min(1.0, seconds))
        self.service.close()


@contextmanager
def serve_link(
    dispatcher: Dispatcher,
    identity: Identity,
    roster: RosterFile,
    *,
    renew: Renew | None = None,
    record: RecordEvent = ignore_event,
    now: Callable[[], float] = time.time,
) -> Iterator[RunningServer]:
    """Serve a dispatcher until the block ends; clients then hear that the server goes down, or that the run is over.

    Raises:
        ConfigError: if the address cannot be listened on.
    """
    started: Future[tuple[asyncio.AbstractEventLoop, RunningServer]] = Future()

    async def run() -> None:
        try:
            running = await start_server(dispatcher, identity, roster, renew=renew, record=record, now=now)
        except ConfigError as error:
            started.set_exception(error)
            return
        started.set_result((asyncio.get_running_loop(), running))
        await running.done.wait()
        await running.drain(dispatcher.settings.drain_s)

    # A thread of its own: the round loop computes for minutes, and calls must be answered meanwhile.
    thread = threading.Thread(target=lambda: asyncio.run(run()), name="fedtune link", daemon=True)
    thread.start()
    loop, running = started.result()
    record("listening", address=dispatcher.settings.listen, port=running.port)
    try:
        yield running
    finally:
        # After an error or a signal: clients wait for the next process instead of taking the run for finished.
        if dispatcher.stopping is None:
            dispatcher.stop(pb.Stop.DRAINING, retry_after_s=RETRY_AFTER_S)
        loop.call_soon_threadsafe(running.done.set)
        thread.join()
        record("stopped")


def check_cipher_suites(set_in_time: bool) -> None:
    """Refuse to serve in a process whose gRPC may not know that only TLS 1.3 is allowed.

    Raises:
        ConfigError: if gRPC was loaded before `fedtune.link` set GRPC_SSL_CIPHER_SUITES.
    """
    if not set_in_time:
        suites = f"GRPC_SSL_CIPHER_SUITES={ENVIRONMENT['GRPC_SSL_CIPHER_SUITES']}"
        hint = f"import fedtune.link before grpc or flwr, or start the process with {suites}"
        raise ConfigError(Fault("", "TLS 1.3 alone", "a process that loaded grpc before it could be set", hint))


async def start_server(
    dispatcher: Dispatcher,
    identity: Identity,
    roster: RosterFile,
    *,
    renew: Renew | None,
    record: RecordEvent,
    now: Callable[[], float],
) -> RunningServer:
    """Start the gRPC server in the running loop.

    Raises:
        ConfigError: if the address cannot be listened on, or older versions of TLS cannot be excluded.
    """
    check_cipher_suites(SET_IN_TIME)
    check_address(dispatcher.settings.listen)
    service = Service(
        dispatcher,
        roster,
        epoch=dispatcher.epoch,
        certificate=(identity.folder / "tls.crt").read_bytes,
        ca=identity.ca,
        renew=renew,
        record=record,
        now=now,
    )
    server = grpc.aio.server(options=server_options(dispatcher.settings, parties=len(roster.current().parties)))
    server.add_generic_rpc_handlers((rpc_handlers(service),))
    address = dispatcher.settings.listen
    try:
        # For an address in use, grpcio raises or returns 0, depending on its release.
        port = server.add_secure_port(address, server_credentials(identity, roster))
    except RuntimeError:
        port = 0
    if not port:
        service.close()
        raise ConfigError(Fault("link.listen", "an address that is free", repr(address), LISTEN_HINT))
    await server.start()
    return RunningServer(dispatcher, service, server, port)
