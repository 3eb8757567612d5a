"""The enrolment service: gRPC on a port of its own, with TLS of the server alone, over a desk; and its limits."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress

import grpc

from fedtune.errors import ConfigError, Fault
from fedtune.link import SET_IN_TIME
from fedtune.link.audit_log import RecordEvent
from fedtune.link.pki.enrollment import MAX_BUNDLE_BYTES
from fedtune.link.pki.identity import Identity
from fedtune.link.rejections import RejectionError, reason_name
from fedtune.link.server.addresses import check_address
from fedtune.link.server.callers import CallContext
from fedtune.link.server.connections import Connections, parse_peer, source_of
from fedtune.link.server.enrolment import Desk
from fedtune.link.server.limits import CallQuota
from fedtune.link.server.server import check_cipher_suites, server_credentials
from fedtune.link.settings import KIB, EnrolmentSettings
from fedtune.wire.v1 import link_pb2 as pb

HANDSHAKE_S = 15.0
CONNECTIONS = 256
PER_SOURCE = 16
"""Connections of one address that have not called; a network behind one address enrols a few sites at once."""
ALL_PER_MIN = 1200
"""Calls of all addresses together: 200 sites that wait."""
PENALTY_S = 1.0
"""After which a call above the limits is answered."""
LOOK_S = 2.0
"""Between two looks at the connections."""
OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.so_reuseport", 0),
    # gRPC holds a message whole before we see it.
    ("grpc.max_receive_message_length", 64 * KIB),
    ("grpc.max_send_message_length", MAX_BUNDLE_BYTES + KIB),
    ("grpc.max_metadata_size", 8 * KIB),
    ("grpc.max_concurrent_streams", 4),
    ("grpc.max_allowed_incoming_connections", CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", int(1000 * HANDSHAKE_S)),
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.max_connection_idle_ms", 60_000),
]


class EnrolmentService:
    """The one call of enrolment; runs in one event loop."""

    def __init__(
        self,
        desk: Desk,
        settings: EnrolmentSettings,
        *,
        record: RecordEvent,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Serve a desk.

        Args:
            desk: takes the requests.
            settings: limits.
            record: receives the events.
            clock: seconds from any start.
        """
        self._desk, self._record = desk, record
        self._sources = CallQuota(settings.calls_per_min, clock)
        self._all = CallQuota(ALL_PER_MIN, clock)
        self._connections = Connections(handshake_s=HANDSHAKE_S, per_source=PER_SOURCE, limit=CONNECTIONS, clock=clock)

    async def enrol(self, request: pb.EnrolRequest, context: CallContext) -> pb.EnrolReply:
        peer = parse_peer(context.peer())
        source = source_of(peer[0]) if peer is not None else ""
        # Before a signature is verified: a flood of guesses must not cost more than a look at a counter.
        try:
            for quota, name in ((self._sources, source), (self._all, "")):
                quota.count(name)
                quota.check(name)
        except RejectionError as error:
            code = reason_name(error.refusal.reason)
            self._record("refused", client=source, reason=str(error), code=code)
            await asyncio.sleep(PENALTY_S)
            return pb.EnrolReply(refusal=error.refusal)
        reply = await asyncio.to_thread(self._desk.enrol, request)
        if reply.refusal.reason == pb.INVITATION_UNKNOWN:
            self._sources.count(source, "refusals")
        else:
            self._connections.note_call(context.peer(), source)
        return reply

    async def watch(self, port: int) -> None:
        """Close connections of the port that are too many, until cancelled."""
        while True:
            self._connections.look(port)
            await asyncio.sleep(LOOK_S)


def enrolment_handlers(service: EnrolmentService) -> grpc.GenericRpcHandler:
    """Return the handlers of the schema's service `Enrolment`, which a test compares with the schema."""
    enrol = grpc.unary_unary_rpc_method_handler(
        service.enrol, pb.EnrolRequest.FromString, pb.EnrolReply.SerializeToString
    )
    return grpc.method_handlers_generic_handler("fedtune.v1.Enrolment", {"Enrol": enrol})


@contextmanager
def serve_enrolment(
    desk: Desk, identity: Identity, settings: EnrolmentSettings, *, record: RecordEvent
) -> Iterator[int]:
    """Serve a desk until the block ends; gives the port.

    Raises:
        ConfigError: if the address cannot be listened on.
    """
    check_cipher_suites(SET_IN_TIME)
    check_address(settings.listen, key="enrolment.listen")
    started: Future[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Future()

    async def run() -> None:
        service = EnrolmentService(desk, settings, record=record)
        server = grpc.aio.server(options=OPTIONS)
        server.add_generic_rpc_handlers((enrolment_handlers(service),))
        try:
            port = server.add_secure_port(settings.listen, server_credentials(identity, None))
        except RuntimeError:
            port = 0
        if not port:
            hint = "choose another port in [enrolment], or stop the server that uses it"
            started.set_exception(
                ConfigError(Fault("enrolment.listen", "an address that is free", repr(settings.listen), hint))
            )
            return
        await server.start()
        watch, done = asyncio.create_task(service.watch(port)), asyncio.Event()
        started.set_result((asyncio.get_running_loop(), done, port))
        await done.wait()
        watch.cancel()
        with suppress(asyncio.CancelledError):
            await watch
        await server.stop(grace=1.0)

    thread = threading.Thread(target=lambda: asyncio.run(run()), name="fedtune enrolment", daemon=True)
    thread.start()
    loop, done, port = started.result()
    record("enrolment", address=settings.listen, port=port)
    try:
        yield port
    finally:
        loop.call_soon_threadsafe(done.set)
        thread.join()
