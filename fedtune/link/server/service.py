"""The six calls of the link: the caller is checked first, then the request, and only then bytes are read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial
from typing import Any, TypeAlias, TypeVar

import grpc

from fedtune.errors import StoreError
from fedtune.link.audit_log import RecordEvent, ignore_event
from fedtune.link.envelopes import PROTOCOL, digest, verify_envelope
from fedtune.link.pki.roster import Party, RosterFile, find_party
from fedtune.link.rejections import TRANSIENT, RejectionError, describe, one_line, reason_name, rejection
from fedtune.link.server.callers import CallContext, Callers, caller_name, identify
from fedtune.link.server.connections import Connections, connection_limit
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.link.server.limits import CallQuota, OpenCall, OpenCalls
from fedtune.link.server.receiving import receive
from fedtune.link.settings import KIB, MIB
from fedtune.wire.v1 import link_pb2 as pb

FetchContext: TypeAlias = "grpc.aio.ServicerContext[pb.FetchRequest, pb.Chunk]"
Renew: TypeAlias = Callable[[Party, pb.RenewRequest], pb.EnrolReply]
Reply = TypeVar("Reply")
RECEIPT_WAIT_S = 20.0
"""How long a Submit is held for its receipt; below the idle limits of common proxies."""
BUSY_RETRY_MS = 100
DISK_THREADS = 4
BUSY_S = 0.25
"""After which a client hears that no place is free for its transfer."""
PENALTY_S = 0.5
"""After which a client above its quota hears so."""
LOOK_S = 0.25
"""Between two looks at the calls that are under way."""
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
        certificate: Callable[[], bytes] = lambda: b"",
        ca: bytes = b"",
        renew: Renew | None = None,
        record: RecordEvent = ignore_event,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Serve a dispatcher.

        Args:
            dispatcher: has the tasks and takes the replies.
            roster: parties and their keys; read again when its file changes.
            epoch: random number of this process, by which clients notice a restart.
            certificate: returns the server's certificate (PEM), which may be renewed meanwhile.
            ca: of the federation (PEM).
            renew: takes the request of a client for a further certificate; None: such requests are refused.
            record: receives the events.
            clock: seconds from any start.
            now: seconds since 1970.
        """
        self._dispatcher, self._roster, self._epoch, self._record = dispatcher, roster, epoch, record
        self._certificate, self._renew, self._clock, self._now = certificate, renew, clock, now
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
        self._callers = Callers(roster, dispatcher.blocklist, ca=ca, now=now, excuse=dispatcher.excuse)
        dispatcher.set_exclusion(self._callers.exclusion)
        self._quota = CallQuota(settings.calls_per_min, clock)
        self._open = OpenCalls(settings, clock)
        self._connections = Connections(
            handshake_s=settings.handshake_s,
            per_source=settings.max_source_handshakes,
            limit=connection_limit(len(roster.current().parties)),
            clock=clock,
        )
        self.fetched_bytes = 0
        """That clients have fetched."""

    # ---- the calls ----

    async def hello(self, request: pb.HelloRequest, context: CallContext) -> pb.HelloReply:
        try:
            party = await self._authenticate(context, hello=True)
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
        roster, run, certificate = self._roster.current(), self._dispatcher.run, self._certificate()
        return pb.HelloReply(
            protocol=PROTOCOL,
            epoch=self._epoch,
            limits=self._limits,
            plan=self._plan,
            recipe=self._dispatcher.run.recipe,
            roster=self._roster.data if roster.version > request.roster_version else b"",
            roster_version=roster.version,
            certificate=certificate,
            proof=run.prove(party.name, nonce=request.nonce, epoch=self._epoch, certificate=certificate),
        )

    async def next(self, request: pb.NextRequest, context: CallContext) -> pb.NextReply:
        try:
            party = await self._authenticate(context)
            if request.epoch != self._epoch:
                raise rejection(pb.STALE_EPOCH, "epoch", "this server's", "another's; say hello")
            self._check_process(party.name, request.process)
        except RejectionError as error:
            return pb.NextReply(refusal=self._refusal(context, error))
        # Cut: a long list from outside would slow down every look at the tasks.
        holding, progress = tuple(request.holding[:MAX_HELD_TASKS]), request.progress[:MAX_HELD_TASKS]
        self._dispatcher.hear(party.name, request.process, progress, request.dropped[:MAX_HELD_TASKS])
        offer = partial(self._dispatcher.offer, party.name, holding)
        try:
            reply = await self._hold(context, party.name, offer, self._dispatcher.settings.hold_s)
        except RejectionError as error:
            return pb.NextReply(refusal=self._refusal(context, error))
        reply = reply or pb.NextReply(wait=pb.Wait())
        reply.roster_version = self._roster.current().version
        return reply

    async def fetch(self, request: pb.FetchRequest, context: FetchContext) -> None:
        try:
            party = await self._authenticate(context)
            body = memoryview(self._dispatcher.body(party.name, request.digest))
            if request.offset > len(body):
                raise rejection(pb.OFFSET, "offset", f"at most {len(body)}", request.offset)
            call = self._begin_download(context, party.name, request.digest)
        except RejectionError as error:
            await pause_if_busy(error)
            await context.write(pb.Chunk(refusal=self._refusal(context, error)))
            return
        step, sent = self._limits.part_bytes, request.offset
        call.left_bytes = len(body) - sent
        try:
            while sent < len(body) and not call.ending:
                # Copied part by part: a body may be larger than the memory that is free. The next one waits until this
                # one has left, since a reader that does not read must not fill it either.
                version = self._roster.current().version
                await context.write(pb.Chunk(data=bytes(body[sent : sent + step]), roster_version=version))
                moved = min(len(body), sent + step) - sent
                self.fetched_bytes += moved
                call.move(moved)
                self._dispatcher.note_fetched(party.name, request.digest, sent, sent + moved)
                sent += moved
            if call.error is not None:
                await context.write(pb.Chunk(refusal=self._refusal(context, call.error)))
        finally:
            self._open.finish(call)
            num_bytes = sent - request.offset
            self._record("fetched", client=party.name, part=request.digest.hex(), bytes=num_bytes)

    async def submit(self, request: pb.SubmitRequest, context: CallContext) -> pb.SubmitReply:
        try:
            party = await self._authenticate(context)
        except RejectionError as error:
            return pb.SubmitReply(refusal=self._refusal(context, error))
        try:
            header, author = verify_envelope(request.envelope, partial(find_party, self._roster.current()))
            # A client must not deliver what another one has signed.
            if author.name != party.name:
                raise rejection(pb.AUTHOR_MISMATCH, "author", party.name, author.name)
            inline = {part.digest: part.data for part in request.inline[:MAX_INLINE_PARTS]}
            submit = partial(self._dispatcher.submit, party.name, digest(request.envelope), header, inline)
            reply = await self._hold(context, party.name, submit, RECEIPT_WAIT_S)
        except RejectionError as error:
            self._dispatcher.count_refusal(party.name, error.refusal)
            return pb.SubmitReply(refusal=self._refusal(context, error, party=party))
        reply = reply or pb.SubmitReply(busy=pb.Wait(retry_after_ms=BUSY_RETRY_MS))
        reply.roster_version = self._roster.current().version
        return reply

    async def push(self, requests: AsyncIterator[pb.PushPart], context: CallContext) -> AsyncIterator[pb.PushAck]:
        party: Party | None = None
        call: OpenCall | None = None
        try:
            party = await self._authenticate(context)
            call = self._begin_upload(context, party.name)
            # Closed here: a call that is cut would leave its file open until the next collection of garbage.
            async with aclosing(receive(self._dispatcher, self._disk, call, requests)) as arriving:
                async for received, complete in arriving:
                    version = self._roster.current().version
                    yield pb.PushAck(taken=received, complete=complete, roster_version=version)
        except RejectionError as error:
            # Not counted where the call was ended from here: its order may have closed in the middle of it.
            if party is not None and (call is None or error is not call.error):
                self._dispatcher.count_refusal(party.name, error.refusal)
            await pause_if_busy(error)
            yield pb.PushAck(refusal=self._refusal(context, error, party=party))
        except StoreError as error:
            self._record("disk", reason=one_line(str(error)))
            # The operator's trouble and not the client's fault: it is not counted, and passes.
            problem = rejection(pb.DISK_LOW, "disk", "a disk that can be written", "none")
            yield pb.PushAck(refusal=self._refusal(context, problem, party=party))
        finally:
            if call is not None:
                self._open.finish(call)

    async def renew(self, request: pb.RenewRequest, context: CallContext) -> pb.EnrolReply:
        try:
            party = await self._authenticate(context, hello=True)
            if self._renew is None:
                raise rejection(pb.RENEWAL_OFF, "request", "a server that takes such requests", "another")
        except RejectionError as error:
            return pb.EnrolReply(refusal=self._refusal(context, error))
        # Signatures and files: in the loop they would delay the calls of all clients.
        loop, renew = asyncio.get_running_loop(), partial(self._renew, party, request)
        reply = await loop.run_in_executor(self._disk, renew)
        if reply.refusal.reason and not reply.refusal.passing:
            self._quota.count(party.name, "refusals")
        return reply

    # ---- shared by the calls ----

    def close(self) -> None:
        self._disk.shutdown(wait=False, cancel_futures=True)

    @property
    def transfers(self) -> int:
        """Uploads and downloads under way now."""
        return self._open.transfers

    async def watch(self, port: int) -> None:
        """End calls that must not go on, and connections of the port that are too many, until cancelled."""
        pause = min(LOOK_S, self._dispatcher.settings.stall_s / 4)
        while True:
            await asyncio.sleep(pause)
            self._open.look()
            if closed := self._connections.look(port):
                connections = "connection" if closed == 1 else "connections"
                reason = "without a call in time, or too many from one address or member"
                self._record("closed", count=closed, reason=f"{closed} {connections} {reason}")

    async def _authenticate(self, context: CallContext, *, hello: bool = False) -> Party:
        """Return the client that calls, as its certificate and the roster name it.

        Raises:
            RejectionError: if it may not call.
        """
        caller = identify(context)
        self._connections.note_call(context.peer(), caller.name)
        # First, and by the name in the certificate: a flood of one that is not admitted is a flood, too.
        self._quota.count(caller.name)
        if hello:
            self._quota.count(caller.name, "hellos")
        try:
            self._quota.check(caller.name, hello=hello)
        except RejectionError:
            # gRPC bounds the calls of a connection, so a pause in each bounds how many a flood makes in a second.
            await asyncio.sleep(PENALTY_S)
            raise
        return self._callers.admit(caller)

    def _begin_download(self, context: CallContext, client: str, part: bytes) -> OpenCall:
        caller, task, peer = identify(context), this_task(), context.peer()
        return self._open.begin(
            client,
            "download",
            interrupt=lambda: None,  # looked for between two parts: gRPC cannot take back one that is on its way
            # Cancelled alone, the stream would stay open on the wire for as long as its reader does not read.
            abandon=lambda: task.cancel() and self._connections.close(peer),
            check=lambda: (self._callers.admit(caller), self._dispatcher.body(client, part)),
        )

    def _begin_upload(self, context: CallContext, client: str) -> OpenCall:
        caller, task, peer = identify(context), this_task(), context.peer()
        call = self._open.begin(
            client,
            "upload",
            # Anywhere else it would end without a word to its client.
            interrupt=lambda: call.reading and task.cancel(),
            abandon=lambda: task.cancel() and self._connections.close(peer),
            check=lambda: self._callers.admit(caller),
        )
        return call

    def _check_process(self, name: str, process: int) -> None:
        """Refuse a second process with the same key, until the first has gone."""
        if not self._dispatcher.claim(name, process):
            raise rejection(pb.NAME_IN_USE, "process", f"one process under the name {name}", "a second one")

    async def _hold(
        self, context: CallContext, client: str, ask: Callable[[], Reply | None], seconds: float
    ) -> Reply | None:
        """Return the first reply of `ask`, which is called whenever something changes; None after so many seconds.

        Raises:
            RejectionError: of `ask`; or if the client is no longer admitted.
        """
        if (reply := ask()) is not None:
            self._dispatcher.sign_of_life(client)
            return reply
        changed, loop, caller = asyncio.Event(), asyncio.get_running_loop(), identify(context)
        call = self._open.begin(client, "held", interrupt=changed.set, check=lambda: self._callers.admit(caller))
        leave = self._dispatcher.listen(client, partial(wake, loop, changed))
        self._dispatcher.hold(client, 1)
        ends = loop.time() + seconds
        try:
            # Asked again after listening: a change in between would be missed, and the client wait in vain.
            while (reply := ask()) is None and not call.ending and (left := ends - loop.time()) > 0:
                # `wake` sets it in this loop, and nothing waits between `ask` and here: no change falls in between.
                changed.clear()
                try:
                    await asyncio.wait_for(changed.wait(), left)
                except TimeoutError:
                    break
            if call.error is not None:
                raise call.error
            return reply
        finally:
            self._open.finish(call)
            leave()
            self._dispatcher.hold(client, -1)

    def _refusal(self, context: CallContext, error: RejectionError, *, party: Party | None = None) -> pb.Refusal:
        """Record a refusal, and return it as it is sent; not a stale epoch: every restart causes one.

        Nor a second process under one name, which asks again and again: the dispatcher records it once.
        """
        name = party.name if party is not None else caller_name(context)
        if error.refusal.reason not in TRANSIENT:
            self._quota.count(name, "refusals")
        if error.refusal.reason not in (pb.STALE_EPOCH, pb.NAME_IN_USE):
            reason, code = describe(error.refusal), reason_name(error.refusal.reason)
            self._record("refused", client=name, reason=reason, code=code)
        return error.refusal


def wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set an event of a loop from any thread."""
    loop.call_soon_threadsafe(event.set)


async def pause_if_busy(error: RejectionError) -> None:
    """Let a client wait for the answer that it must wait: it would ask again at once."""
    if error.refusal.reason == pb.BUSY:
        await asyncio.sleep(BUSY_S)


def this_task() -> asyncio.Task[Any]:
    """Return the task of the call that is being served."""
    task = asyncio.current_task()
    assert task is not None
    return task


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
        "Renew": unary(service.renew, pb.RenewRequest.FromString, pb.EnrolReply.SerializeToString),
        "Push": upload(service.push, pb.PushPart.FromString, pb.PushAck.SerializeToString),
    }
    return grpc.method_handlers_generic_handler("fedtune.v1.Link", handlers)
