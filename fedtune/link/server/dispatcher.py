"""What a coordinator has asked and been answered: orders, answers and receipts by client, between gRPC and the rounds.

Two threads call: the round loop posts orders, collects what came and says what became of it; the service offers the
orders to the clients and takes what they answer. Nothing here waits for a network.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import TypeAlias

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.link import uploads
from fedtune.link.audit_log import RecordEvent, silent
from fedtune.link.envelopes import HELLO, PROTOCOL, TRAIN, UPDATE, build, digest, expect, part, seal, subject
from fedtune.link.rejections import PASSING, code, describe, one_line, rejection
from fedtune.link.server.blocklist import Blocklist
from fedtune.link.settings import KIB, MIB, LinkSettings
from fedtune.store.files import make_folder, store_errors
from fedtune.wire.v1 import link_pb2 as pb

Body: TypeAlias = bytes | memoryview
"""Bytes of a part; a view of a file where they are many."""
SPOOL_KEEP_S = 24 * 3600.0
KEPT_RECEIPTS = 10_000
ROUNDS_OF_REFUSALS = 10
DAY_S = 24 * 3600.0


@dataclass(frozen=True)
class RunInfo:
    """What all statements of a run have in common."""

    federation: str
    run: str
    """The run's number."""
    recipe: bytes
    """TOML."""
    author: str
    """The coordinator's name."""
    key: Ed25519PrivateKey = field(repr=False)

    @property
    def recipe_digest(self) -> bytes:
        return sha256(self.recipe).digest()

    def plan(self) -> pb.Envelope:
        """Return the statement that this is the recipe of the run."""
        return self.seal(pb.Header(kind=pb.PLAN, parts=[part("", self.recipe)], build=build()))

    def seal(self, header: pb.Header) -> pb.Envelope:
        """Return a statement of the coordinator's."""
        header.protocol, header.federation, header.run, header.author = PROTOCOL, self.federation, self.run, self.author
        header.recipe = self.recipe_digest
        return seal(header, self.key)


@dataclass
class Task:
    """What a client is asked, as long as somebody may use its answer."""

    client: str
    digest: bytes
    envelope: pb.Envelope
    header: pb.Header
    limit: int
    """Bytes beyond which no honest answer goes."""
    ends: float | None
    posted: float
    ids: list[str] = field(default_factory=list)
    """Under which the round loop waits for it."""
    answer: TaskAnswer | None = None


@dataclass
class TaskAnswer:
    """What has come for an order."""

    digest: bytes
    header: pb.Header
    bodies: dict[bytes, Body] = field(default_factory=dict)
    """Whole parts by digest."""
    whole: bool = False
    receipt: pb.Envelope | None = None


@dataclass(frozen=True)
class ReceivedParts:
    """An answer, for the round loop."""

    client: str
    bodies: Mapping[str, Body]
    """By key."""


@dataclass(frozen=True)
class Withdrawn:
    """There will be no answer, and why."""

    client: str
    reason: str


@dataclass(frozen=True)
class ClientPresence:
    """How a client stands."""

    connected: bool
    seen_s: float
    """Seconds since its last sign of life."""
    orders: int
    num_bytes: int
    """That it has sent within a day."""


class Dispatcher:
    """Orders, answers and receipts of a run; see the module."""

    def __init__(
        self,
        run: RunInfo,
        settings: LinkSettings,
        folder: Path,
        bars: Blocklist,
        *,
        accepted: Mapping[tuple[int, str], str] | None = None,
        ended: int = 0,
        tell: RecordEvent = silent,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin, or go on with, a run.

        Args:
            run: what its statements have in common.
            settings: patience and quotas.
            folder: for what arrives; made if need be.
            bars: clients that nothing is taken from.
            accepted: SHA-256 (hex) of the updates that the run's journal holds, by round and client.
            ended: number of the last round that is over.
            tell: told what happens.
            clock: seconds from any start.

        Raises:
            StoreError: if the folder cannot be made.
        """
        self.run, self.settings, self.folder, self.bars = run, settings, folder, bars
        self.base = b""
        """Digest of the run's base, once it is known."""
        self.limit: Callable[[bytes], int] = lambda front: settings.hello_mib * MIB
        """From the header of an assignment to the bytes beyond which no honest answer goes."""
        self.journal_end: Callable[[], tuple[int, str]] = lambda: (0, "")
        """Records of the run's journal, and the digest (hex) of the last."""
        self.stopping: pb.Stop | None = None
        self._accepted, self._ended = dict(accepted or {}), ended
        self._tell, self._clock = tell, clock
        self._lock, self._news = threading.RLock(), threading.Condition()
        self._cohort: Collection[str] = ()
        self._orders: dict[str, dict[bytes, Task]] = {}  # by client and digest
        self._bodies: dict[bytes, Body] = {}  # of open orders
        self._ready: dict[str, ReceivedParts | Withdrawn] = {}  # by message id
        self._numbers = count()  # of questions: no two have the same id
        self._fresh = False  # whether something has come that nobody has been woken for
        self._waiting: dict[str, Task] = {}  # by message id
        self._receipts: dict[tuple[str, bytes], tuple[bytes, pb.Envelope]] = {}  # by client and order: answer, receipt
        self._seen: dict[str, float] = {}
        self._held: dict[str, int] = {}  # calls that are being held
        self._listeners: dict[str, list[Callable[[], None]]] = {}
        self._sent: dict[str, list[tuple[float, int]]] = {}
        self._told = set[str]()  # who knows that there is no more work
        self._rounds = 0  # that this process has begun
        self._refusals: dict[str, list[int]] = {}  # rounds in which a client was refused for good
        with store_errors(folder):
            make_folder(folder)
            uploads.sweep(folder, older_s=SPOOL_KEEP_S)

    # ---- the round loop's side ----

    def fleet(self) -> Sequence[str]:
        """Return who has given a sign of life within `lease_s`."""
        with self._lock:
            now = self._clock()
            return sorted(
                name for name, seen in self._seen.items() if self._held.get(name) or now - seen < self.settings.lease_s
            )

    def post(self, client: str, task: str, front: bytes, bodies: Mapping[str, bytes], *, seconds: float) -> str:
        """Ask a client for something, and return the id of the question.

        What has been asked already, and not been answered for good, is not asked again: its answer is waited for.

        Args:
            client: its name.
            task: HELLO or TRAIN.
            front: header of the message.
            bodies: by key.
            seconds: after which the round loop will not wait for it.

        Raises:
            WireError: if a round's message is no assignment.
        """
        contents = {"": front, **bodies}
        parts = [part(key, contents[key]) for key in sorted(contents)]
        header = pb.Header(kind=pb.ORDER, to=client, task=task, parts=parts)
        if task == HELLO:
            header.nonce, limit = secrets.randbits(64), self.settings.hello_mib * MIB
        else:
            number, base, state = subject(front, parts)
            header.round, header.base, header.state = number, bytes.fromhex(base) or self.base, state
            header.cohort, limit = len(self._cohort), self.limit(front)
        envelope = self.run.seal(header)
        now = self._clock()
        order = Task(client, digest(envelope), envelope, header, limit, now + seconds, now)
        with self._lock:
            mine = self._orders.setdefault(client, {})
            if task == HELLO:  # one is enough, and the last one is the one that is waited for
                for earlier in [one for one in mine.values() if one.header.task == HELLO]:
                    self._close(earlier)
            else:  # a client that asked for more: what it had sent is taken note of
                for earlier in [one for one in mine.values() if one.header.task == TRAIN]:
                    if earlier.digest != order.digest and earlier.header.round == header.round:
                        self._conclude(earlier, pb.NOTED)
            if order.digest not in mine:  # asked anew: what an earlier answer came to does not count any more
                self._receipts.pop((client, order.digest), None)
            order = mine.setdefault(order.digest, order)
            if order.answer is not None and order.answer.receipt is not None:  # noted, and not enough
                order.answer = None
                self._receipts.pop((client, order.digest), None)
            order.ends = now + seconds
            message_id = f"{order.digest.hex()}.{next(self._numbers)}"
            order.ids.append(message_id)
            self._waiting[message_id] = order
            self._bodies |= {one.digest: contents[one.key] for one in parts}
            if order.answer is not None and order.answer.whole:
                self._deliver(order)
            self._wake(client)
        self._tell(
            "asked",
            client=client,
            task=task,
            round=header.round,
            order=order.digest.hex(),
            bytes=sum(one.num_bytes for one in parts),
        )
        return message_id

    def collect(self, ids: Collection[str]) -> Mapping[str, ReceivedParts | Withdrawn]:
        """Return what has come of these questions; each is told once."""
        with self._lock:
            now = self._clock()
            for message_id in ids:
                order = self._waiting.get(message_id)
                if order is not None and message_id not in self._ready and self._lost(order, now):
                    reason = f"no sign of life for {now - self._seen.get(order.client, order.posted):.0f} s"
                    self._ready[message_id] = Withdrawn(order.client, reason)
                    self._tell("lost", client=order.client, round=order.header.round, reason=reason)
            found = {message_id: self._ready.pop(message_id) for message_id in ids if message_id in self._ready}
            for message_id in found:
                self._waiting.pop(message_id, None)
            return found

    def wait(self, seconds: float) -> None:
        """Wait until something has come, or so long."""
        with self._news:
            if not self._fresh:
                self._news.wait(seconds)
            self._fresh = False

    def opened(self, cohort: Collection[str]) -> None:
        """Note who is asked in the round that begins."""
        with self._lock:
            self._cohort = tuple(cohort)
            self._rounds += 1

    def settle(self, client: str, number: int, refusal: pb.Refusal | None) -> None:
        """Say what became of a client's answer in a round: it is durable and used, or refused."""
        with self._lock:
            for order in list(self._orders.get(client, {}).values()):
                answer = order.answer
                if order.header.round == number and answer is not None and answer.whole and answer.receipt is None:
                    self._conclude(order, pb.REFUSED if refusal else pb.ACCEPTED, refusal)
                    if refusal:
                        self.note_refusal(client, refusal)

    def end(self, number: int) -> None:
        """Note that a round is over: who works for it still may stop."""
        with self._lock:
            self._ended = max(self._ended, number)
            for orders in list(self._orders.values()):
                for order in [one for one in orders.values() if 0 < one.header.round <= number]:
                    self._conclude(order, pb.LATE)
                    for message_id in order.ids:
                        if self._waiting.pop(message_id, None) is not None:
                            self._ready[message_id] = Withdrawn(order.client, "its round has ended")
                    self._close(order)

    def stop(self, why: pb.Stop.Why, *, retry_after_s: float = 0.0) -> None:
        """Tell every client that asks that there is no more work."""
        with self._lock:
            self.stopping = pb.Stop(why=why, retry_after_ms=int(1000 * retry_after_s))
            for client in list(self._listeners):
                self._wake(client)

    def untold(self) -> Sequence[str]:
        """Return who does not know yet that there is no more work, and is here to be told.

        At the end of a run these are all who gave a sign of life lately: nobody will be here when they come back.
        """
        with self._lock:
            held = [name for name, calls in self._held.items() if calls > 0]
            finished = self.stopping is not None and self.stopping.why == pb.Stop.FINISHED
            return sorted({*held, *(self.fleet() if finished else ())} - self._told)

    def status(self) -> Mapping[str, ClientPresence]:
        """Return how each client stands that has ever come."""
        with self._lock:
            now = self._clock()
            return {
                name: ClientPresence(
                    connected=bool(self._held.get(name)) or now - seen < self.settings.lease_s,
                    seen_s=0.0 if self._held.get(name) else now - seen,
                    orders=len(self._orders.get(name, {})),
                    num_bytes=self._day(name),
                )
                for name, seen in sorted(self._seen.items())
            }

    # ---- the service's side ----

    def sign_of_life(self, client: str) -> None:
        with self._lock:
            if client not in self._seen or self._clock() - self._seen[client] >= self.settings.lease_s:
                self._news_of_fleet()
            self._seen[client] = self._clock()

    def hold(self, client: str, by: int) -> None:
        """Note that a call of a client is being held (1), or not any more (-1)."""
        with self._lock:
            self._held[client] = self._held.get(client, 0) + by
            self.sign_of_life(client)

    def listen(self, client: str, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` whenever something changes for a client, until what is returned is called."""
        with self._lock:
            self._listeners.setdefault(client, []).append(listener)

        def leave() -> None:
            with self._lock:
                self._listeners[client].remove(listener)

        return leave

    def offer(self, client: str, holding: Collection[bytes]) -> pb.NextReply | None:
        """Return what there is to say to a client that works on some orders already; None if nothing."""
        with self._lock:
            orders = self._orders.get(client, {})
            for held in holding:
                if held not in orders:
                    return pb.NextReply(withdrawn=pb.Withdrawn(order=held))
            for order in orders.values():
                if order.digest not in holding and (order.answer is None or not order.answer.whole):
                    left_s = max(0.0, (order.ends or 0.0) - self._clock())
                    inline = self._inline(order)
                    return pb.NextReply(work=pb.Work(order=order.envelope, inline=inline, left_ms=int(1000 * left_s)))
            if self.stopping is None:
                return None
            self._told.add(client)
            return pb.NextReply(stop=self.stopping)

    def body(self, client: str, wanted: bytes) -> Body:
        """Return a part of an open order of a client.

        Raises:
            RefusalError: if there is no such part.
        """
        with self._lock:
            mine = self._orders.get(client, {}).values()
            if not any(one.digest == wanted for order in mine for one in order.header.parts):
                raise rejection(pb.NOT_WANTED, "digest", "a part of an open order of this client", wanted[:16].hex())
            return self._bodies[wanted]

    def submit(
        self, client: str, answer: bytes, header: pb.Header, inline: Mapping[bytes, bytes]
    ) -> pb.SubmitReply | None:
        """Take an answer in as far as it has come, and return what to reply; None as long as its receipt is pending.

        Args:
            client: who the certificate says it is.
            answer: digest of its header.
            header: verified, and of the same author.
            inline: bytes of parts by digest; verified here.

        Raises:
            RefusalError: if it does not answer an open order, or is not what may be answered.
        """
        with self._lock:
            expect(header, federation=self.run.federation, run=self.run.run)
            if header.kind not in (pb.ANSWER, pb.DECLINE):
                raise rejection(pb.KIND_NOT_EXPECTED, "kind", "ANSWER or DECLINE", header.kind)
            if (known := self._receipts.get((client, header.order))) is not None:
                if known[0] != answer:
                    raise rejection(
                        pb.CONFLICT, "answer", f"{known[0].hex()[:16]}, which came first", answer.hex()[:16]
                    )
                return pb.SubmitReply(receipt=known[1])
            order = self._orders.get(client, {}).get(header.order)
            if order is None:
                return self._past(client, answer, header)
            expect(
                header,
                round=order.header.round,
                recipe=self.run.recipe_digest,
                base=order.header.base,
                state=order.header.state,
            )
            if self.settings.build:
                expect(header, build=self.settings.build)
            if header.kind == pb.DECLINE:
                return self._declined(order, answer, header)
            self._check_parts(order, header)
            if order.answer is None or (order.answer.digest != answer and not order.answer.whole):
                self._check_quota(client, header)
                self._forget(order)
                order.answer = TaskAnswer(answer, header)
            elif order.answer.digest != answer:
                first = f"{order.answer.digest.hex()[:16]}, which came first"
                raise rejection(pb.CONFLICT, "answer", first, answer.hex()[:16])
            return self._gathered(order, order.answer, inline)

    def part(self, client: str, answer: bytes, wanted: bytes) -> pb.Part:
        """Return the part of an answer whose bytes are waited for.

        Raises:
            RefusalError: if nobody waits for them.
        """
        with self._lock:
            for order in self._orders.get(client, {}).values():
                if order.answer is not None and order.answer.digest == answer and not order.answer.whole:
                    for one in order.answer.header.parts:
                        if one.digest == wanted and wanted not in order.answer.bodies:
                            return one
            raise rejection(pb.NOT_WANTED, "digest", "a part that is waited for", wanted[:16].hex())

    def sent(self, client: str, num_bytes: int) -> None:
        """Count what a client has sent."""
        with self._lock:
            self._seen[client] = self._clock()
            self._sent.setdefault(client, []).append((self._clock(), num_bytes))

    def note_refusal(self, client: str, refusal: pb.Refusal) -> None:
        """Count a refusal that no repetition can mend; after `bar_after` of them in ten rounds the client is barred."""
        if refusal.reason in PASSING or refusal.reason == pb.ORDER_UNKNOWN:
            return
        with self._lock:
            counted = [one for one in self._refusals.get(client, []) if self._rounds - one < ROUNDS_OF_REFUSALS]
            self._refusals[client] = [*counted, self._rounds]
            if len(counted) + 1 < self.settings.bar_after:
                return
            del self._refusals[client]
            why = f"{len(counted) + 1} refusals within {ROUNDS_OF_REFUSALS} rounds, the last {code(refusal.reason)}"
            self.bars.bar(client, why)
            self._tell("barred", client=client, reason=why)
            self._wake(client)

    # ---- within the lock ----

    def _inline(self, order: Task) -> Sequence[pb.Inline]:
        """Return the parts of an order that travel with it, as far as they fit one message."""
        found, left = list[pb.Inline](), 512 * KIB
        for one in order.header.parts:
            if one.num_bytes <= min(self.settings.inline_kib * KIB, left):
                found.append(pb.Inline(digest=one.digest, data=bytes(self._bodies[one.digest])))
                left -= one.num_bytes
        return found

    def _past(self, client: str, answer: bytes, header: pb.Header) -> pb.SubmitReply:
        """Return the receipt of an answer to an order that is not open: it was given before, or comes too late."""
        for one in header.parts:
            if self._accepted.get((header.round, client)) == one.digest.hex():
                return pb.SubmitReply(receipt=self._receipt(client, answer, header, pb.ACCEPTED))
        if 0 < header.round <= self._ended:
            self._tell("late", client=client, round=header.round)
            return pb.SubmitReply(receipt=self._receipt(client, answer, header, pb.LATE))
        asked = any(one.header.round == header.round for one in self._orders.get(client, {}).values())
        if header.round == self._ended + 1 and not asked:  # this process has not come to ask it again yet
            return pb.SubmitReply(busy=pb.Wait(retry_after_ms=500))
        raise rejection(pb.ORDER_UNKNOWN, "order", "an order of this client", header.order.hex()[:16])

    def _declined(self, order: Task, answer: bytes, header: pb.Header) -> pb.SubmitReply:
        if order.answer is not None and order.answer.whole:
            raise rejection(pb.CONFLICT, "answer", "the answer that came first", "a decline")
        veto = pb.Veto.Name(header.decline.veto) if header.decline.veto in pb.Veto.values() else "VETO_UNKNOWN"
        note = one_line(header.decline.note, longest=500)
        reason = note if header.decline.veto == pb.WORK_FAILED else f"declined, {veto}: {note}"
        for message_id in order.ids:
            if message_id in self._waiting:
                self._ready[message_id] = Withdrawn(order.client, reason)
        self._announce()
        self._tell("declined", client=order.client, round=order.header.round, veto=veto, reason=note)
        receipt = self._receipt(order.client, answer, header, pb.NOTED)
        self._keep(order, answer, receipt)
        self._close(order)
        return pb.SubmitReply(receipt=receipt)

    def _check_parts(self, order: Task, header: pb.Header) -> None:
        keys = [one.key for one in header.parts]
        if order.header.task == TRAIN:
            if keys != [UPDATE]:
                raise rejection(pb.PARTS, "parts", [UPDATE], keys[:4])
        elif "" not in keys:
            raise rejection(pb.PARTS, "parts", "a profile and its body", keys[:4])
        total = sum(one.num_bytes for one in header.parts)
        if total > order.limit:
            raise rejection(pb.BODY_SIZE, "parts", f"at most {order.limit} bytes", total)

    def _check_quota(self, client: str, header: pb.Header) -> None:
        total = sum(one.num_bytes for one in header.parts)
        limit = int(self.settings.day_gib * 2**30)
        if self._day(client) + total > limit:
            raise rejection(pb.QUOTA, "parts", f"at most {limit} bytes a day", self._day(client) + total)
        free = uploads.free_bytes(self.folder)
        if free < total + self.settings.free_mib * MIB:
            raise rejection(pb.DISK_LOW, "disk", f"{total + self.settings.free_mib * MIB} bytes free", free)

    def _day(self, client: str) -> int:
        now = self._clock()
        kept = [(at, size) for at, size in self._sent.get(client, []) if now - at < DAY_S]
        self._sent[client] = kept
        return sum(size for _, size in kept)

    def _gathered(self, order: Task, answer: TaskAnswer, inline: Mapping[bytes, bytes]) -> pb.SubmitReply | None:
        """Take in what has come of an answer; return what is missing, the receipt, or None until there is one."""
        wanted = list[pb.Want]()
        for one in answer.header.parts:
            if one.digest in answer.bodies:
                continue
            if (data := inline.get(one.digest)) is not None:
                if len(data) != one.num_bytes or sha256(data).digest() != one.digest:
                    raise rejection(pb.DIGEST, one.key, one.digest.hex()[:16], sha256(data).hexdigest()[:16])
                answer.bodies[one.digest] = data
                self.sent(order.client, len(data))
                continue
            path = uploads.place(self.folder, order.client, one.digest)
            wanted.append(pb.Want(digest=one.digest, offset=uploads.stored_bytes(path)))
        if wanted:
            return pb.SubmitReply(wanted=pb.Wanted(parts=wanted))
        if not answer.whole:
            answer.whole = True
            self._deliver(order)
            self._tell(
                "answered",
                client=order.client,
                task=order.header.task,
                round=order.header.round,
                answer=answer.digest.hex(),
                bytes=sum(one.num_bytes for one in answer.header.parts),
            )
            if order.header.task == HELLO:
                self._conclude(order, pb.NOTED)
                self._close(order)
        return pb.SubmitReply(receipt=answer.receipt) if answer.receipt is not None else None

    def arrived(self, client: str, answer: bytes, wanted: bytes) -> None:
        """Note that a part lies whole in the folder."""
        with self._lock:
            for order in self._orders.get(client, {}).values():
                if order.answer is not None and order.answer.digest == answer:
                    order.answer.bodies[wanted] = uploads.map_file(uploads.place(self.folder, client, wanted))

    def _deliver(self, order: Task) -> None:
        assert order.answer is not None
        bodies = {one.key: order.answer.bodies[one.digest] for one in order.answer.header.parts}
        for message_id in order.ids:
            if message_id in self._waiting:
                self._ready[message_id] = ReceivedParts(order.client, bodies)
        self._announce()

    def _conclude(self, order: Task, verdict: pb.Verdict, refusal: pb.Refusal | None = None) -> None:
        """Give the receipt of a whole answer that has none."""
        answer = order.answer
        if answer is None or not answer.whole or answer.receipt is not None:
            return
        answer.receipt = self._receipt(order.client, answer.digest, answer.header, verdict, refusal)
        self._keep(order, answer.digest, answer.receipt)
        if verdict == pb.ACCEPTED:  # as the journal has it, for who asks when the receipt is kept no longer
            for one in answer.header.parts:
                self._accepted[(order.header.round, order.client)] = one.digest.hex()
        for one in answer.header.parts:
            uploads.place(self.folder, order.client, one.digest).unlink(missing_ok=True)
        answer.bodies.clear()
        self._tell(
            "receipt",
            client=order.client,
            round=order.header.round,
            answer=answer.digest.hex(),
            verdict=pb.Verdict.Name(verdict),
            reason=describe(refusal) if refusal else "",
        )
        self._wake(order.client)

    def _receipt(
        self,
        client: str,
        answer: bytes,
        header: pb.Header,
        verdict: pb.Verdict,
        refusal: pb.Refusal | None = None,
    ) -> pb.Envelope:
        records, head = self.journal_end()
        receipt = self.run.seal(
            pb.Header(
                kind=pb.RECEIPT,
                to=client,
                round=header.round,
                order=header.order,
                receipt=pb.Receipt(
                    answer=answer,
                    verdict=verdict,
                    refusal=refusal,
                    journal_records=records,
                    journal_head=bytes.fromhex(head),
                ),
                build=build(),
            )
        )
        return receipt

    def _keep(self, order: Task, answer: bytes, receipt: pb.Envelope) -> None:
        """Keep the receipt of an order that was asked, to be given again as the same bytes."""
        self._receipts[(order.client, order.digest)] = answer, receipt
        while len(self._receipts) > KEPT_RECEIPTS:
            del self._receipts[next(iter(self._receipts))]

    def _close(self, order: Task) -> None:
        """Forget an order, and the bodies that no other one needs."""
        self._orders.get(order.client, {}).pop(order.digest, None)
        self._forget(order)
        needed = {
            one.digest for orders in self._orders.values() for each in orders.values() for one in each.header.parts
        }
        for one in order.header.parts:
            if one.digest not in needed:
                self._bodies.pop(one.digest, None)
        self._wake(order.client)

    def _forget(self, order: Task) -> None:
        """Remove what lies on the disk of an answer that is not waited for any more."""
        if order.answer is not None:
            for one in order.answer.header.parts:
                uploads.place(self.folder, order.client, one.digest).unlink(missing_ok=True)

    def _lost(self, order: Task, now: float) -> bool:
        return not self._held.get(order.client) and (
            now - self._seen.get(order.client, order.posted) > self.settings.lost_s
        )

    def _wake(self, client: str) -> None:
        for listener in self._listeners.get(client, ()):
            listener()

    def _announce(self) -> None:
        with self._news:
            self._fresh = True
            self._news.notify_all()

    def _news_of_fleet(self) -> None:
        self._announce()
