"""The five calls of the link: the caller is checked first, then the request, and only then bytes are read."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, TypeAlias, TypeVar

import grpc

from fedtune.errors import StoreError
from fedtune.link import uploads
from fedtune.link.audit_log import RecordEvent, ignore_event
from fedtune.link.envelopes import PROTOCOL, digest, verify_envelope
from fedtune.link.pki.certificates import serial_number, spiffe_parts
from fedtune.link.pki.roster import Party, Roster, RosterFile, find_party
from fedtune.link.rejections import RejectionError, describe, one_line, reason_name, rejection
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.link.settings import KIB, MIB
from fedtune.wire.v1 import link_pb2 as pb

CallContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Reply = TypeVar("Reply")
BATCH_BYTES = MIB
"""Of an upload that are hashed and written at once: one change of threads for many messages."""
RECEIPT_WAIT_S = 20.0
"""How long a Submit is held for its receipt; below the idle limits of common proxies."""
BUSY_RETRY_MS = 100
DISK_THREADS = 4
MAX_HELD_TASKS = 16
MAX_INLINE_PARTS = 64
"""As many as a header may name."""


class Service:
    """The calls of the link over a dispatcher; runs in one event loop."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        roster: RosterFile,
        *,
        epoch: int,
        record: RecordEvent = ignore_event,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Serve a dispatcher.

        Args:
            dispatcher: has the tasks and takes the replies.
            roster: parties and their keys; read again when its file changes.
            epoch: random number of this process, by which clients notice a restart.
            record: receives the events.
            clock: seconds from any start.
            now: seconds since 1970.
        """
        self._dispatcher, self._roster, self._epoch, self._record = dispatcher, roster, epoch, record
        self._clock, self._now = clock, now
        settings = dispatcher.settings
        self._limits = pb.Limits(
            part_bytes=settings.part_kib * KIB,
            window_bytes=settings.window_mib * MIB,
            inline_bytes=settings.inline_kib * KIB,
            hold_ms=int(1000 * settings.hold_s),
            stall_ms=int(1000 * settings.stall_s),
        )
        self._plan = dispatcher.run.plan()
        # Disk and hashing in threads: in the loop they would delay the calls of all clients.
        self._disk = ThreadPoolExecutor(max_workers=DISK_THREADS, thread_name_prefix="fedtune disk")
        # Without a lock: every call runs in one loop, and none waits between a test of these and a change.
        self._free_uploads = settings.max_concurrent_uploads
        self._free_downloads = settings.max_concurrent_downloads
        self._pushing = set[tuple[str, bytes]]()  # by client and part
        self._calls: dict[str, deque[float]] = {}  # times of the last minute's, by client
        self.transfers = 0
        """Under way now."""
        self.fetched_bytes = 0
        """That clients have fetched."""

    # ---- the calls ----

    async def hello(self, request: pb.HelloRequest, context: CallContext) -> pb.HelloReply:
        try:
            party = self._authenticate(context)
            if PROTOCOL not in request.protocols:
                raise rejection(pb.PROTOCOL, "protocols", f"version {PROTOCOL} among them", list(request.protocols)[:8])
            if request.federation != self._dispatcher.run.federation:
                expected = self._dispatcher.run.federation
                raise rejection(pb.WRONG_FEDERATION, "federation", expected, request.federation)
            if (pinned := self._dispatcher.settings.build) and request.build != pinned:
                raise rejection(pb.BUILD_DIFFERS, "build", pinned, request.build)
            self._check_process(party.name, request.process)
        except RejectionError as error:
            return pb.HelloReply(refusal=self._refusal(context, error))
        build = one_line(request.build)
        self._record("hello", client=party.name, build=build, roster=request.roster_version)
        self._dispatcher.greet(party.name)
        is_newer = self._roster.current().version > request.roster_version
        return pb.HelloReply(
            protocol=PROTOCOL,
            epoch=self._epoch,
            limits=self._limits,
            plan=self._plan,
            recipe=self._dispatcher.run.recipe,
            roster=self._roster.data if is_newer else b"",
        )

    async def next(self, request: pb.NextRequest, context: CallContext) -> pb.NextReply:
        try:
            party = self._authenticate(context)
            if request.epoch != self._epoch:
                raise rejection(pb.STALE_EPOCH, "epoch", "this server's", "another's; say hello")
            self._check_process(party.name, request.process)
        except RejectionError as error:
            return pb.NextReply(refusal=self._refusal(context, error))
        # Cut: a long list from outside would slow down every look at the tasks.
        holding = tuple(request.holding[:MAX_HELD_TASKS])
        offer = partial(self._dispatcher.offer, party.name, holding)
        reply = await self._hold(party.name, offer, self._dispatcher.settings.hold_s)
        return reply or pb.NextReply(wait=pb.Wait())

    async def fetch(self, request: pb.FetchRequest, context: CallContext) -> AsyncIterator[pb.Chunk]:
        try:
            party = self._authenticate(context)
            body = memoryview(self._dispatcher.body(party.name, request.digest))
            if request.offset > len(body):
                raise rejection(pb.OFFSET, "offset", f"at most {len(body)}", request.offset)
            if not self._free_downloads:
                limit = self._dispatcher.settings.max_concurrent_downloads
                raise rejection(pb.BUSY, "downloads", f"at most {limit} at once", "one more")
        except RejectionError as error:
            yield pb.Chunk(refusal=self._refusal(context, error))
            return
        step, sent = self._limits.part_bytes, request.offset
        self._free_downloads -= 1
        self.transfers += 1
        try:
            while sent < len(body):
                # Copied part by part: a body may be larger than the memory that is free.
                yield pb.Chunk(data=bytes(body[sent : sent + step]))
                self.fetched_bytes += min(len(body), sent + step) - sent
                sent = min(len(body), sent + step)
                self._dispatcher.sign_of_life(party.name)
        finally:
            self._free_downloads += 1
            self.transfers -= 1
            num_bytes = sent - request.offset
            self._record("fetched", client=party.name, part=request.digest.hex(), bytes=num_bytes)

    async def submit(self, request: pb.SubmitRequest, context: CallContext) -> pb.SubmitReply:
        try:
            party = self._authenticate(context)
        except RejectionError as error:
            return pb.SubmitReply(refusal=self._refusal(context, error))
        try:
            header, author = verify_envelope(request.envelope, partial(find_party, self._roster.current()))
            # A client must not deliver what another one has signed.
            if author.name != party.name:
                raise rejection(pb.AUTHOR_MISMATCH, "author", party.name, author.name)
            inline = {part.digest: part.data for part in request.inline[:MAX_INLINE_PARTS]}
            submit = partial(self._dispatcher.submit, party.name, digest(request.envelope), header, inline)
            reply = await self._hold(party.name, submit, RECEIPT_WAIT_S)
        except RejectionError as error:
            self._dispatcher.count_refusal(party.name, error.refusal)
            return pb.SubmitReply(refusal=self._refusal(context, error, party=party))
        return reply or pb.SubmitReply(busy=pb.Wait(retry_after_ms=BUSY_RETRY_MS))

    async def push(self, requests: AsyncIterator[pb.PushPart], context: CallContext) -> AsyncIterator[pb.PushAck]:
        party: Party | None = None
        try:
            party = self._authenticate(context)
            with self._upload_slot():
                async for received, complete in self._receive(party.name, requests):
                    yield pb.PushAck(taken=received, complete=complete)
        except RejectionError as error:
            if party is not None:
                self._dispatcher.count_refusal(party.name, error.refusal)
            yield pb.PushAck(refusal=self._refusal(context, error, party=party))
        except StoreError as error:
            self._record("disk", reason=one_line(str(error)))
            # The operator's trouble and not the client's fault: it is not counted, and passes.
            problem = rejection(pb.DISK_LOW, "disk", "a disk that can be written", "none")
            yield pb.PushAck(refusal=self._refusal(context, problem, party=party))

    # ---- shared by the calls ----

    def close(self) -> None:
        self._disk.shutdown(wait=False, cancel_futures=True)

    def _authenticate(self, context: CallContext) -> Party:
        """Return the client that calls, as its certificate and the roster name it.

        Raises:
            RejectionError: if it may not call.
        """
        federation, name, serial = certificate_identity(caller_certificate(context))
        roster = self._valid_roster()
        if federation != roster.federation:
            raise rejection(pb.WRONG_FEDERATION, "certificate", roster.federation, federation)
        party = roster.parties.get(name)
        if party is None:
            raise rejection(pb.NOT_IN_ROSTER, "certificate", f"a party of {roster.federation}", name)
        if party.state != "active":
            raise rejection(pb.REVOKED, "roster", "an active party", f"{name}, {party.state}")
        # TLS has accepted every certificate of the CA; the roster names those that still count after a renewal.
        if serial not in party.serials:
            raise rejection(pb.SERIAL_UNKNOWN, "certificate", " or ".join(party.serials), serial)
        if party.role != "client":
            raise rejection(pb.WRONG_ROLE, "roster", "the role client", f"{name}, {party.role}")
        if reason := self._dispatcher.blocklist.reason(name):
            raise rejection(pb.BARRED, "operator", f"{name} to be admitted", reason)
        # Last: only clients of the roster get a queue, so that strangers cannot fill the memory.
        self._limit_calls(name)
        return party

    def _check_process(self, name: str, process: int) -> None:
        """Refuse a second process with the same key, until the first has gone."""
        if not self._dispatcher.claim(name, process):
            raise rejection(pb.NAME_IN_USE, "process", f"one process under the name {name}", "a second one")

    def _valid_roster(self) -> Roster:
        roster = self._roster.current()
        # It may still name clients that have been revoked since.
        if self._now() > roster.valid_until:
            got = f"version {roster.version}"
            raise rejection(pb.ROSTER_OLD, "roster", "a roster on the server that is valid", got)
        return roster

    def _limit_calls(self, name: str) -> None:
        calls, now, limit = (
            self._calls.setdefault(name, deque()),
            self._clock(),
            self._dispatcher.settings.calls_per_min,
        )
        while calls and now - calls[0] > 60:
            calls.popleft()
        if len(calls) >= limit:
            raise rejection(pb.TOO_MANY_CALLS, "calls", f"at most {limit} a minute", len(calls) + 1)
        calls.append(now)

    async def _hold(self, client: str, ask: Callable[[], Reply | None], seconds: float) -> Reply | None:
        """Return the first reply of `ask`, which is called whenever something changes; None after so many seconds."""
        if (reply := ask()) is not None:
            self._dispatcher.sign_of_life(client)
            return reply
        changed, loop = asyncio.Event(), asyncio.get_running_loop()
        leave = self._dispatcher.listen(client, partial(wake, loop, changed))
        self._dispatcher.hold(client, 1)
        ends = loop.time() + seconds
        try:
            # Asked again after listening: a change in between would be missed, and the client wait in vain.
            while (reply := ask()) is None and (left := ends - loop.time()) > 0:
                # `wake` sets it in this loop, and nothing waits between `ask` and here: no change falls in between.
                changed.clear()
                try:
                    await asyncio.wait_for(changed.wait(), left)
                except TimeoutError:
                    break
            return reply
        finally:
            leave()
            self._dispatcher.hold(client, -1)

    @contextmanager
    def _upload_slot(self) -> Iterator[None]:
        if not self._free_uploads:
            limit = self._dispatcher.settings.max_concurrent_uploads
            raise rejection(pb.BUSY, "uploads", f"at most {limit} at once", "one more")
        self._free_uploads -= 1
        self.transfers += 1
        try:
            yield
        finally:
            self._free_uploads += 1
            self.transfers -= 1

    async def _receive(self, client: str, requests: AsyncIterator[pb.PushPart]) -> AsyncIterator[tuple[int, bool]]:
        """Write an upload to the disk; yields the bytes received so far, and whether the part is whole."""
        loop, stall_s = asyncio.get_running_loop(), self._dispatcher.settings.stall_s
        stream = aiter(requests)
        first = await next_message(stream, stall_s)
        if first is None:
            return
        part = self._dispatcher.missing_part(client, first.answer, first.digest)
        key = (client, first.digest)
        # Two transfers of one part would append to one file.
        if key in self._pushing:
            got = "another; the one before may not have noticed its end"
            raise rejection(pb.BUSY, "part", "one transfer of it", got)
        self._pushing.add(key)
        path = uploads.part_path(self._dispatcher.folder, client, part.digest)
        incoming = None
        try:
            incoming = await loop.run_in_executor(self._disk, uploads.IncomingUpload, path, part, first.offset)
            waiting, size = [first.data], len(first.data)
            while True:
                # The last bytes are written at once, all others in batches.
                if size >= BATCH_BYTES or incoming.received_bytes + size >= part.num_bytes:
                    await loop.run_in_executor(self._disk, incoming.append, b"".join(waiting))
                    self._dispatcher.count_bytes(client, size)
                    waiting, size = [], 0
                    if incoming.received_bytes == part.num_bytes:
                        break
                    # Acknowledged when written: the client's window then bounds what waits in this process's memory.
                    yield incoming.received_bytes, False
                if (message := await next_message(stream, stall_s)) is None:
                    # Cut off: what came stays on the disk, and the next transfer goes on behind it.
                    return
                waiting.append(message.data)
                size += len(message.data)
            if incoming.finish():
                self._dispatcher.add_pushed_part(client, first.answer, part.digest)
                yield incoming.received_bytes, True
        finally:
            self._pushing.discard(key)
            if incoming is not None:
                # Also when the call is cancelled, so that nothing is sent twice; a batch at most, so the loop goes on.
                if waiting and incoming.received_bytes + size <= part.num_bytes:
                    incoming.append(b"".join(waiting))
                    self._dispatcher.count_bytes(client, size)
                incoming.close()

    def _refusal(self, context: CallContext, error: RejectionError, *, party: Party | None = None) -> pb.Refusal:
        """Record a refusal, and return it as it is sent; not a stale epoch: every restart causes one.

        Nor a second process under one name, which asks again and again: the dispatcher records it once.
        """
        name = party.name if party is not None else caller_name(context)
        if error.refusal.reason not in (pb.STALE_EPOCH, pb.NAME_IN_USE):
            reason, code = describe(error.refusal), reason_name(error.refusal.reason)
            self._record("refused", client=name, reason=reason, code=code)
        return error.refusal


def wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set an event of a loop from any thread."""
    loop.call_soon_threadsafe(event.set)


async def next_message(stream: AsyncIterator[pb.PushPart], stall_s: float) -> pb.PushPart | None:
    """Return the next message, or None at the stream's end.

    Raises:
        RejectionError: if none comes within `stall_s`.
    """
    try:
        return await asyncio.wait_for(anext(stream), stall_s)
    except StopAsyncIteration:
        return None
    except TimeoutError:
        raise rejection(pb.STALLED, "push", f"bytes within {stall_s:g} s", "none") from None


def caller_certificate(context: CallContext) -> bytes:
    """Return the certificate of the caller (PEM), which TLS has verified against the federation's CA."""
    (pem,) = context.auth_context()["x509_pem_cert"]
    return bytes(pem)


# Every call brings the certificate, which is the same for a whole connection.
@lru_cache(maxsize=1024)
def certificate_identity(pem: bytes) -> tuple[str, str, str]:
    """Return federation, name and serial number of a certificate.

    Raises:
        RejectionError: if it names no party of a federation.
    """
    try:
        federation, _, name = spiffe_parts(pem)
    except ValueError as error:
        raise rejection(pb.NOT_IN_ROSTER, "certificate", "one made by fedtune enroll", error) from None
    return federation, name, serial_number(pem)


def caller_name(context: CallContext) -> str:
    """Return the name in the caller's certificate, for a log."""
    try:
        return certificate_identity(caller_certificate(context))[1]
    except RejectionError:
        return "(unknown)"


def rpc_handlers(service: Service) -> grpc.GenericRpcHandler:
    """Return the handlers of the schema's service `Link`, which a test compares with the schema."""
    unary, upload = grpc.unary_unary_rpc_method_handler, grpc.stream_stream_rpc_method_handler
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Hello": unary(service.hello, pb.HelloRequest.FromString, pb.HelloReply.SerializeToString),
        "Next": unary(service.next, pb.NextRequest.FromString, pb.NextReply.SerializeToString),
        "Fetch": grpc.unary_stream_rpc_method_handler(
            service.fetch, pb.FetchRequest.FromString, pb.Chunk.SerializeToString
        ),
        "Submit": unary(service.submit, pb.SubmitRequest.FromString, pb.SubmitReply.SerializeToString),
        "Push": upload(service.push, pb.PushPart.FromString, pb.PushAck.SerializeToString),
    }
    return grpc.method_handlers_generic_handler("fedtune.v1.Link", handlers)
