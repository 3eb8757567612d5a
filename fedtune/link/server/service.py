"""The five calls of the link, as gRPC hands them in: who calls is checked first, then what, then bytes are taken."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, TypeAlias

import grpc

from fedtune.errors import StoreError
from fedtune.link import uploads
from fedtune.link.audit_log import RecordEvent, silent
from fedtune.link.envelopes import PROTOCOL, digest, verify_envelope
from fedtune.link.pki.certificates import serial as serial_of
from fedtune.link.pki.certificates import spiffe
from fedtune.link.pki.roster import Party, Roster, RosterFile, by_key_id
from fedtune.link.rejections import RejectionError, code, describe, one_line, rejection
from fedtune.link.server.dispatcher import Dispatcher
from fedtune.link.settings import KIB, MIB
from fedtune.wire.v1 import link_pb2 as pb

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
BATCH = MIB
"""Bytes of an upload that are hashed and written at once."""
ANSWER_S = 20.0
"""How long a Submit is held for its receipt."""


class Service:
    """The calls of the link over a hub; runs in one event loop."""

    def __init__(
        self,
        hub: Dispatcher,
        roster: RosterFile,
        *,
        epoch: int,
        tell: RecordEvent = silent,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Serve a hub.

        Args:
            hub: what is asked and answered.
            roster: who is who; read again when its file changes.
            epoch: of this process.
            tell: told what happens.
            clock: seconds from any start.
            now: seconds since 1970.
        """
        self._hub, self._roster, self._epoch, self._tell = hub, roster, epoch, tell
        self._clock, self._now = clock, now
        settings = hub.settings
        self._limits = pb.Limits(
            part_bytes=settings.part_kib * KIB,
            window_bytes=settings.window_mib * MIB,
            inline_bytes=settings.inline_kib * KIB,
            hold_ms=int(1000 * settings.hold_s),
            stall_ms=int(1000 * settings.stall_s),
        )
        self._plan = hub.run.plan()
        self._disk = ThreadPoolExecutor(max_workers=4, thread_name_prefix="fedtune disk")
        self._uploads, self._downloads = settings.uploads, settings.downloads  # slots that are free
        self._pushing = set[tuple[str, bytes]]()
        self._calls: dict[str, deque[float]] = {}
        self.transfers = 0
        """That are under way."""

    # ---- the calls ----

    async def hello(self, request: pb.HelloRequest, context: Context) -> pb.HelloReply:
        try:
            member = self._peer(context)
            if PROTOCOL not in request.protocols:
                raise rejection(pb.PROTOCOL, "protocols", f"version {PROTOCOL} among them", list(request.protocols)[:8])
            if request.federation != self._hub.run.federation:
                raise rejection(pb.WRONG_FEDERATION, "federation", self._hub.run.federation, request.federation)
            if (pinned := self._hub.settings.build) and request.build != pinned:
                raise rejection(pb.BUILD_DIFFERS, "build", pinned, request.build)
        except RejectionError as error:
            return pb.HelloReply(refusal=self._refused(context, error))
        build = one_line(request.build)
        self._tell("hello", client=member.name, build=build, roster=request.roster_version)
        self._hub.sign_of_life(member.name)
        newer = self._roster.current().version > request.roster_version
        return pb.HelloReply(
            protocol=PROTOCOL,
            epoch=self._epoch,
            limits=self._limits,
            plan=self._plan,
            recipe=self._hub.run.recipe,
            roster=self._roster.data if newer else b"",
        )

    async def next(self, request: pb.NextRequest, context: Context) -> pb.NextReply:
        try:
            member = self._peer(context)
            if request.epoch != self._epoch:
                raise rejection(pb.STALE_EPOCH, "epoch", "this server's", "another's; say hello")
        except RejectionError as error:
            return pb.NextReply(refusal=self._refused(context, error))
        holding = tuple(request.holding[:16])
        found = await self._held(member.name, lambda: self._hub.offer(member.name, holding), self._hub.settings.hold_s)
        return found or pb.NextReply(wait=pb.Wait())

    async def fetch(self, request: pb.FetchRequest, context: Context) -> AsyncIterator[pb.Chunk]:
        try:
            member = self._peer(context)
            body = memoryview(self._hub.body(member.name, request.digest))
            if request.offset > len(body):
                raise rejection(pb.OFFSET, "offset", f"at most {len(body)}", request.offset)
            if not self._downloads:
                raise rejection(pb.BUSY, "downloads", f"at most {self._hub.settings.downloads} at once", "one more")
        except RejectionError as error:
            yield pb.Chunk(refusal=self._refused(context, error))
            return
        step, sent = self._limits.part_bytes, request.offset
        self._downloads -= 1
        self.transfers += 1
        try:
            while sent < len(body):
                yield pb.Chunk(data=bytes(body[sent : sent + step]))
                sent = min(len(body), sent + step)
                self._hub.sign_of_life(member.name)
        finally:
            self._downloads += 1
            self.transfers -= 1
            self._tell("fetched", client=member.name, part=request.digest.hex(), bytes=sent - request.offset)

    async def submit(self, request: pb.SubmitRequest, context: Context) -> pb.SubmitReply:
        try:
            member = self._peer(context)
        except RejectionError as error:
            return pb.SubmitReply(refusal=self._refused(context, error))
        try:
            header, author = verify_envelope(request.envelope, partial(by_key_id, self._roster.current()))
            if author.name != member.name:
                raise rejection(pb.AUTHOR_MISMATCH, "author", member.name, author.name)
            inline = {one.digest: one.data for one in request.inline[:64]}
            ask = partial(self._hub.submit, member.name, digest(request.envelope), header, inline)
            found = await self._held(member.name, ask, ANSWER_S)
        except RejectionError as error:
            self._hub.note_refusal(member.name, error.refusal)
            return pb.SubmitReply(refusal=self._refused(context, error, member=member))
        return found or pb.SubmitReply(busy=pb.Wait(retry_after_ms=100))

    async def push(self, requests: AsyncIterator[pb.PushPart], context: Context) -> AsyncIterator[pb.PushAck]:
        member: Party | None = None
        try:
            member = self._peer(context)
            with self._slot():
                async for taken, complete in self._received(member.name, requests):
                    yield pb.PushAck(taken=taken, complete=complete)
        except RejectionError as error:
            if member is not None:
                self._hub.note_refusal(member.name, error.refusal)
            yield pb.PushAck(refusal=self._refused(context, error, member=member))
        except StoreError as error:
            self._tell("disk", reason=one_line(str(error)))
            problem = rejection(pb.DISK_LOW, "disk", "a disk that can be written", "none")
            yield pb.PushAck(refusal=self._refused(context, problem, member=member))

    # ---- what they share ----

    def close(self) -> None:
        self._disk.shutdown(wait=False, cancel_futures=True)

    def _peer(self, context: Context) -> Party:
        """Return who calls: the client that its certificate and the roster name.

        Raises:
            RefusalError: if it may not.
        """
        federation, name, serial = certificate_identity(certificate(context))
        roster = self._current()
        if federation != roster.federation:
            raise rejection(pb.WRONG_FEDERATION, "certificate", roster.federation, federation)
        member = roster.members.get(name)
        if member is None:
            raise rejection(pb.NOT_IN_ROSTER, "certificate", f"a member of {roster.federation}", name)
        if member.state != "active":
            raise rejection(pb.REVOKED, "roster", "an active member", f"{name}, {member.state}")
        if serial not in member.serials:
            raise rejection(pb.SERIAL_UNKNOWN, "certificate", " or ".join(member.serials), serial)
        if member.role != "client":
            raise rejection(pb.WRONG_ROLE, "roster", "the role client", f"{name}, {member.role}")
        if why := self._hub.bars.why(name):
            raise rejection(pb.BARRED, "operator", f"{name} to be admitted", why)
        self._limit_calls(name)
        return member

    def _current(self) -> Roster:
        roster = self._roster.current()
        if self._now() > roster.valid_until:
            raise rejection(
                pb.ROSTER_OLD, "roster", "a roster on the server that is valid", f"version {roster.version}"
            )
        return roster

    def _limit_calls(self, name: str) -> None:
        calls, now, limit = self._calls.setdefault(name, deque()), self._clock(), self._hub.settings.calls_per_min
        while calls and now - calls[0] > 60:
            calls.popleft()
        if len(calls) >= limit:
            raise rejection(pb.TOO_MANY_CALLS, "calls", f"at most {limit} a minute", len(calls) + 1)
        calls.append(now)

    async def _held(self, client: str, ask: Callable[[], Any], seconds: float) -> Any:
        """Return what `ask` gives, as soon as it gives something, or None after so many seconds."""
        if (found := ask()) is not None:
            self._hub.sign_of_life(client)
            return found
        changed, loop = asyncio.Event(), asyncio.get_running_loop()
        leave = self._hub.listen(client, partial(wake, loop, changed))
        self._hub.hold(client, 1)
        ends = loop.time() + seconds
        try:
            # Looked at again after listening: what came in between has told nobody.
            while (found := ask()) is None and (left := ends - loop.time()) > 0:
                changed.clear()
                try:
                    await asyncio.wait_for(changed.wait(), left)
                except TimeoutError:
                    break
            return found
        finally:
            leave()
            self._hub.hold(client, -1)

    @contextmanager
    def _slot(self) -> Iterator[None]:
        if not self._uploads:
            raise rejection(pb.BUSY, "uploads", f"at most {self._hub.settings.uploads} at once", "one more")
        self._uploads -= 1
        self.transfers += 1
        try:
            yield
        finally:
            self._uploads += 1
            self.transfers -= 1

    async def _received(self, client: str, requests: AsyncIterator[pb.PushPart]) -> AsyncIterator[tuple[int, bool]]:
        """Write what comes of a part, and yield how far it is and whether it is whole."""
        loop, stall_s = asyncio.get_running_loop(), self._hub.settings.stall_s
        stream = aiter(requests)
        first = await coming(stream, stall_s)
        if first is None:
            return
        part = self._hub.part(client, first.answer, first.digest)
        key = (client, first.digest)
        if key in self._pushing:
            raise rejection(
                pb.BUSY, "part", "one transfer of it", "another; the one before may not have noticed its end"
            )
        self._pushing.add(key)
        path = uploads.place(self._hub.folder, client, part.digest)
        incoming = None
        try:
            incoming = await loop.run_in_executor(self._disk, uploads.IncomingUpload, path, part, first.offset)
            waiting, size = [first.data], len(first.data)
            while True:
                # The last bytes are taken at once, others in batches: to hash and to write costs a change of threads.
                if size >= BATCH or incoming.taken + size >= part.num_bytes:
                    await loop.run_in_executor(self._disk, incoming.append, b"".join(waiting))
                    self._hub.sent(client, size)
                    waiting, size = [], 0
                    if incoming.taken == part.num_bytes:
                        break
                    yield incoming.taken, False
                if (message := await coming(stream, stall_s)) is None:
                    return  # cut off: what came stays, and the next transfer goes on behind it
                waiting.append(message.data)
                size += len(message.data)
            if incoming.finish():
                self._hub.arrived(client, first.answer, part.digest)
                yield incoming.taken, True
        finally:
            self._pushing.discard(key)
            if incoming is not None:
                if waiting and incoming.taken + size <= part.num_bytes:
                    incoming.append(b"".join(waiting))
                    self._hub.sent(client, size)
                incoming.close()

    def _refused(self, context: Context, error: RejectionError, *, member: Party | None = None) -> pb.Refusal:
        who = member.name if member is not None else caller_name(context)
        if error.refusal.reason != pb.STALE_EPOCH:
            self._tell("refused", client=who, reason=describe(error.refusal), code=code(error.refusal.reason))
        return error.refusal


def wake(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    """Set an event of a loop from any thread."""
    loop.call_soon_threadsafe(event.set)


async def coming(stream: AsyncIterator[pb.PushPart], stall_s: float) -> pb.PushPart | None:
    """Return the next message, or None at the stream's end.

    Raises:
        RefusalError: if none comes for so long.
    """
    try:
        return await asyncio.wait_for(anext(stream), stall_s)
    except StopAsyncIteration:
        return None
    except TimeoutError:
        raise rejection(pb.STALLED, "push", f"bytes within {stall_s:g} s", "none") from None


def certificate(context: Context) -> bytes:
    """Return the certificate of the caller, which TLS has verified against the federation's CA."""
    (pem,) = context.auth_context()["x509_pem_cert"]
    return bytes(pem)


@lru_cache(maxsize=1024)
def certificate_identity(pem: bytes) -> tuple[str, str, str]:
    """Return federation, name and serial of a certificate.

    Raises:
        RefusalError: if it names no member of a federation.
    """
    try:
        federation, _, name = spiffe(pem)
    except ValueError as error:
        raise rejection(pb.NOT_IN_ROSTER, "certificate", "one made by fedtune enroll", error) from None
    return federation, name, serial_of(pem)


def caller_name(context: Context) -> str:
    """Return who calls by its certificate, for a log."""
    try:
        return certificate_identity(certificate(context))[1]
    except RejectionError:
        return "(unknown)"


def handlers(service: Service) -> grpc.GenericRpcHandler:
    """Return the handlers of every call that the schema names."""
    made: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in pb.DESCRIPTOR.services_by_name["Link"].methods:
        kinds: Mapping[tuple[bool, bool], Callable[..., grpc.RpcMethodHandler[Any, Any]]] = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }
        made[method.name] = kinds[method.client_streaming, method.server_streaming](
            getattr(service, method.name.lower()),
            request_deserializer=getattr(pb, method.input_type.name).FromString,
            response_serializer=getattr(pb, method.output_type.name).SerializeToString,
        )
    return grpc.method_handlers_generic_handler("fedtune.v1.Link", made)
