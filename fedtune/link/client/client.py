"""A site's half of the link: it dials, vets what it is asked, has it done, and sends it until it has a receipt."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, TypeVar

import grpc

from fedtune.errors import ClientError, ConfigError, Fault, FedtuneError, WireError
from fedtune.link.audit_log import RecordEvent, silent
from fedtune.link.client import outbox, policy
from fedtune.link.client.channel import PASSING, Calls, diagnose, dial
from fedtune.link.client.outbox import Entry
from fedtune.link.client.policy import Policy, Usage
from fedtune.link.client.training_process import Trainer
from fedtune.link.envelopes import HELLO, PROTOCOL, TRAIN, UPDATE, build, digest, expect, part, seal, verify_envelope
from fedtune.link.pki.identity import Identity
from fedtune.link.pki.roster import Party, RosterFile, by_key_id, decode, newer
from fedtune.link.rejections import FATAL, RejectionError, code, describe, one_line
from fedtune.link.settings import MIB, JoinSettings
from fedtune.link.uploads import BLOCK, free_bytes
from fedtune.store.files import store_errors, write_bytes
from fedtune.wire.codec import MAX_HEADER_BYTES
from fedtune.wire.v1 import link_pb2 as pb

CALL_S = 10.0
SUBMIT_S = 60.0
TELL_EACH_S = 300.0
"""How often a site that cannot reach its server says why."""
GOOD_S = 60.0
"""Of good calls, after which pauses are short again."""
MOST_INLINE = 768 * 1024
FREE = 512 * MIB
"""Of this site's disk that stay free, whatever an order brings."""
RUN = re.compile(r"[0-9a-f]{16}")
Reply = TypeVar("Reply")
End = Literal["finished", "stopped"]


class StoppedError(FedtuneError):
    """The client is to end, or what it works on has been withdrawn."""


@dataclass(frozen=True)
class Greeting:
    """What the server has said of itself and the run."""

    epoch: int
    limits: pb.Limits
    run: str
    plan: pb.Envelope
    recipe: bytes

    @property
    def recipe_digest(self) -> bytes:
        return sha256(self.recipe).digest()


@dataclass
class Job:
    """An order that is being worked on."""

    order: bytes
    header: pb.Header
    over: threading.Event = field(default_factory=threading.Event)
    """Set when its answer is of no use any more."""
    training: bool = False


class Client:
    """A site in a federation; `run` returns when the run is over or somebody stops it."""

    def __init__(
        self,
        identity: Identity,
        roster: RosterFile,
        settings: JoinSettings,
        rules: Policy,
        state: Path,
        trainer: Trainer,
        *,
        tell: RecordEvent = silent,
        agree: Callable[[Greeting], bool] = lambda greeting: True,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Bind a site.

        Args:
            identity: who it is.
            roster: who the others are.
            settings: where the server is.
            rules: what the site will do.
            state: folder of its outbox.
            trainer: does the work.
            tell: told what happens.
            agree: asked before the site takes part in a run.
            clock: seconds from any start.
            now: seconds since 1970.
        """
        self._identity, self._roster, self._settings, self._rules = identity, roster, settings, rules
        self._state, self._trainer, self._tell, self._agree = state, trainer, tell, agree
        self._clock, self._now = clock, now
        self._stop = threading.Event()
        self._calls: Calls = dial(identity, settings)
        self._greeting: Greeting | None = None
        self._jobs: dict[bytes, Job] = {}
        self._lock = threading.Lock()
        self._profile = threading.Event()  # set when it has been written, or cannot be
        self._fault: FedtuneError | None = None  # of a thread; ends the client
        self._failures, self._good_since, self._told_at = 0, 0.0, float("-inf")
        self._unreached_since: float | None = None

    def stop(self) -> None:
        """End soon: what is under way is given up and kept for the next start."""
        self._stop.set()
        self._calls.close()

    def greet(self) -> Greeting:
        """Say hello once, and return what the server says; for whoever only wants to know.

        Raises:
            ConfigError: if the server cannot be reached or does not take this site.
        """
        try:
            return self._hello()
        except grpc.RpcError as error:
            found = diagnose(self._identity, self._settings)
            raise ConfigError(
                Fault("link.address", "a server that answers", f"{self._settings.address}: {found.reason}")
            ) from error

    def run(self) -> End:
        """Take part until the run is over.

        Raises:
            ConfigError: if something must be changed before this can succeed.
            StoreError: if the outbox cannot be written.
        """
        loader = threading.Thread(target=self._guarded(self._load), name="fedtune load", daemon=True)
        loader.start()
        try:
            while not self._stop.is_set():
                if self._fault is not None:
                    raise self._fault
                try:
                    if self._greeting is None:
                        self._begin(self._hello())
                    if (end := self._turn()) is not None:
                        return end
                    self._reached()
                except (grpc.RpcError, ValueError) as error:
                    if self._fault is not None:
                        raise self._fault from error
                    if isinstance(error, ValueError):  # grpc's word for a channel that was closed before a call began
                        break
                    self._unreached(error)
            return "stopped"
        except StoppedError:
            return "stopped"
        finally:
            self._stop.set()
            for job in self._jobs.values():
                job.over.set()
            self._trainer.kill()
            self._calls.close()

    # ---- the conversation ----

    def _hello(self) -> Greeting:
        """Say hello.

        Raises:
            ConfigError: if the server does not take this site, or is not the one it should be.
            grpc.RpcError: if it cannot be reached.
        """
        request = pb.HelloRequest(
            protocols=[PROTOCOL],
            federation=self._identity.federation,
            build=build(),
            roster_version=self._roster.current().version,
        )
        while (reply := self._calls.hello(request, timeout=CALL_S)).HasField("refusal"):
            self._refuse(reply.refusal)
        if reply.roster:
            self._take_roster(reply.roster)
        if self._now() > (held := self._roster.current()).valid_until:
            got = f"version {held.version}, which has expired, and none newer from the server"
            raise ConfigError(Fault("link.identity", "a roster that is valid", got, "ask the coordinator to renew it"))
        try:
            plan, _ = verify_envelope(reply.plan, self._coordinator)
            expect(plan, federation=self._identity.federation, kind=pb.PLAN, recipe=sha256(reply.recipe).digest())
        except RejectionError as error:
            raise ConfigError(Fault("link.address", "a run that the coordinator has signed", str(error))) from None
        if not RUN.fullmatch(plan.run):  # it becomes the name of a folder here
            raise ConfigError(Fault("link.address", "a run whose number has 16 hex digits", repr(plan.run[:50])))
        return Greeting(reply.epoch, reply.limits, plan.run, reply.plan, reply.recipe)

    def _begin(self, greeting: Greeting) -> None:
        """Take part in a run, or go on with it: what was answered and has no receipt is sent first."""
        if self._stop.is_set():
            return
        known = (self._state / "runs" / greeting.run).exists()
        self._tell(
            "hello",
            server=self._settings.address,
            run=greeting.run,
            recipe=greeting.recipe_digest.hex(),
            going_on=int(known),
        )
        if not known and not self._agree(greeting):
            raise StoppedError("somebody at the site did not agree to the recipe")
        outbox.keep_plan(self._state, greeting.run, greeting.plan, greeting.recipe)
        with self._lock:
            for job in self._jobs.values():
                if job.header.run != greeting.run:
                    self._withdraw(job)
        self._greeting = greeting
        for entry in outbox.entries(self._state, greeting.run):
            if entry.answer() is not None and entry.receipt() is None and entry.digest not in self._jobs:
                self._start(entry.digest, entry.header, self._send_again, entry)

    def _turn(self) -> End | None:
        """Ask for work once, and begin it."""
        greeting = self._greeting
        assert greeting is not None
        with self._lock:
            holding = list(self._jobs)
        request = pb.NextRequest(epoch=greeting.epoch, holding=holding)
        reply = self._calls.next(request, timeout=greeting.limits.hold_ms / 1000 + CALL_S)
        match reply.WhichOneof("what"):
            case "work":
                self._work(reply.work)
            case "withdrawn":
                with self._lock:
                    if (job := self._jobs.get(reply.withdrawn.order)) is not None:
                        self._withdraw(job)
            case "stop" if reply.stop.why == pb.Stop.FINISHED:
                self._tell("finished", run=greeting.run)
                return "finished"
            case "stop":
                self._tell("draining", run=greeting.run)
                self._greeting = None
                self._pause(reply.stop.retry_after_ms / 1000)
            case "refusal" if reply.refusal.reason == pb.STALE_EPOCH:
                self._greeting = None
            case "refusal":
                self._refuse(reply.refusal)
            case _:
                self._pause(reply.wait.retry_after_ms / 1000)
        return None

    def _work(self, work: pb.Work) -> None:
        """Begin an order, whatever it is; what is not signed as it should be is told and dropped."""
        greeting = self._greeting
        assert greeting is not None
        try:
            header, _ = verify_envelope(work.order, self._coordinator)
            expect(header, federation=self._identity.federation, run=greeting.run, kind=pb.ORDER)
            expect(header, to=self._identity.name, recipe=greeting.recipe_digest)
        except RejectionError as error:
            self._tell("refused", reason=describe(error.refusal), code=code(error.refusal.reason))
            self._pause(1.0)
            return
        order, inline = digest(work.order), {one.digest: one.data for one in work.inline}
        if order in self._jobs:
            return
        if header.task == HELLO:
            self._start(order, header, self._say_hello)
        elif header.task == TRAIN and header.round > 0:
            self._start(order, header, self._train, work.order, inline)
        else:
            self._start(order, header, self._decline_unknown)

    def _start(self, order: bytes, header: pb.Header, work: Callable[..., None], *args: Any) -> None:
        job = Job(order, header)
        with self._lock:
            self._jobs[order] = job

        def run() -> None:
            try:
                work(job, *args)
            except StoppedError:
                pass
            except (WireError, ClientError) as error:  # somebody's bytes: they cost this order alone
                self._tell("failed", round=job.header.round, reason=one_line(str(error), longest=500))
                self._stop.wait(1.0)
            finally:
                with self._lock:
                    self._jobs.pop(order, None)

        name = f"fedtune round {header.round}" if header.round else "fedtune hello"
        threading.Thread(target=self._guarded(run), name=name, daemon=True).start()

    def _guarded(self, work: Callable[[], None]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except StoppedError:
                pass
            except FedtuneError as error:
                self._fault = self._fault or error
                self._calls.close()  # wakes whoever waits for the server
            except ValueError:  # grpc's word for a channel that was closed before a call began
                if self._fault is None and not self._stop.is_set():
                    raise

        return run

    def _withdraw(self, job: Job) -> None:
        if not job.over.is_set():
            job.over.set()
            self._tell("withdrawn", round=job.header.round, order=job.order.hex())
            if job.training:
                self._trainer.kill()

    # ---- orders ----

    def _load(self) -> None:
        """Load base and data, and keep what the site says of itself."""
        folder = self._state / "profile"
        shutil.rmtree(folder, ignore_errors=True)
        began = self._clock()
        try:
            self._trainer.profile(folder)
            self._tell("loaded", seconds=int(self._clock() - began))
        finally:
            self._profile.set()

    def _say_hello(self, job: Job) -> None:
        while not self._profile.wait(1.0):
            self._check(job)
        folder = self._state / "profile"
        with store_errors(folder):
            contents = {path.name: path.read_bytes() for path in folder.iterdir()}
        parts = {"" if name == "front" else name: data for name, data in contents.items()}
        header = self._answer(job.header, job.order, parts=[part(key, parts[key]) for key in sorted(parts)])
        paths = {sha256(data).digest(): folder / name for name, data in contents.items()}
        self._deliver(job, self._request(header, paths), paths)

    def _train(self, job: Job, order: pb.Envelope, inline: Mapping[bytes, bytes]) -> None:
        greeting = self._greeting
        assert greeting is not None
        entry = outbox.entry(self._state, order, job.header)
        self._tell(
            "asked", round=job.header.round, order=job.order.hex(), bytes=sum(p.num_bytes for p in job.header.parts)
        )
        if (request := entry.answer()) is not None:
            self._send(job, entry, request)
            return
        outbox.tidy(self._state, job.header.run, keep=entry)
        try:
            request = self._made(job, entry, inline, greeting)
        except (ClientError, WireError) as error:
            request = self._declined(job, pb.WORK_FAILED, str(error))
        self._check(job)
        if pb.Header.FromString(request.envelope.header).kind == pb.DECLINE:
            self._deliver(job, request, {})  # not kept: whoever asks again may find what failed mended
            return
        if request.inline or not entry.update.exists():
            entry.keep_answer(request)
            self._send(job, entry, request)
            return
        # Bytes that a crash loses have done nothing before the answer is submitted as whole: a new one may replace it.
        lasting = threading.Thread(
            target=self._guarded(lambda: store_answer(entry, request)), name="fedtune disk", daemon=True
        )
        lasting.start()
        try:
            self._send(job, entry, request, lasting=lasting)
        finally:
            lasting.join()

    def _made(self, job: Job, entry: Entry, inline: Mapping[bytes, bytes], greeting: Greeting) -> pb.SubmitRequest:
        """Vet an order, fetch what belongs to it, have it done, and return the signed answer; its part is durable."""
        front = next((one for one in job.header.parts if not one.key), None)
        if front is None or front.num_bytes > MAX_HEADER_BYTES:
            raise WireError(f"expected an order with an assignment of at most {MAX_HEADER_BYTES} bytes; got another")
        rules = self._rules  # what has been done is looked up only where it counts
        spent = Usage(
            rounds=outbox.count_answers(self._state, job.header.run) if rules.max_rounds is not None else 0,
            day_bytes=outbox.bytes_sent_last_day(self._state, now=self._now()) if rules.day_up_mib is not None else 0,
        )
        self._fetch(job, entry, front, inline)
        asked = policy.demand(job.header, entry.part(front.digest).read_bytes())
        recipe = greeting.recipe_digest.hex()
        vetoes = policy.check_policy(self._rules, asked, recipe, spent, now=datetime.fromtimestamp(self._now()).time())
        if vetoes:
            return self._declined(job, vetoes[0].veto, "; ".join(one.note for one in vetoes))
        if (free := free_bytes(self._state)) < asked.num_bytes + FREE:
            note = f"{asked.num_bytes} bytes do not fit the disk, where {free} are free and {FREE} stay so"
            return self._declined(job, pb.TOO_MANY_BYTES, note)
        for one in job.header.parts:
            self._fetch(job, entry, one, inline)
        with store_errors(entry.folder):
            (entry.folder / "front").write_bytes(entry.part(front.digest).read_bytes())
        bodies = [one.digest.hex() for one in job.header.parts if one.key]
        job.training = True
        try:
            self._trainer.perform(entry.folder, bodies, entry.update)
        finally:
            job.training = False
        size = entry.update.stat().st_size
        if (veto := policy.leaves(self._rules, size, spent)) is not None:
            entry.update.unlink()
            return self._declined(job, veto.veto, veto.note)
        found = file_sha256(entry.update)
        header = self._answer(job.header, job.order, parts=[pb.Part(key=UPDATE, digest=found, num_bytes=size)])
        return self._request(header, {found: entry.update})

    def _send_again(self, job: Job, entry: Entry) -> None:
        request = entry.answer()
        assert request is not None
        self._send(job, entry, request)

    def _send(
        self, job: Job, entry: Entry, request: pb.SubmitRequest, *, lasting: threading.Thread | None = None
    ) -> None:
        """Send an answer until there is a receipt, and keep that."""
        header = pb.Header.FromString(request.envelope.header)
        paths = {} if request.inline else {one.digest: entry.update for one in header.parts}
        receipt = self._deliver(job, request, paths, lasting=lasting)
        if receipt is not None:
            entry.keep_receipt(receipt)

    def _deliver(
        self,
        job: Job,
        request: pb.SubmitRequest,
        paths: Mapping[bytes, Path],
        *,
        lasting: threading.Thread | None = None,
    ) -> pb.Envelope | None:
        """Submit and push until there is a receipt, which is returned; None after a refusal.

        `lasting` makes the answer durable, and is waited for before what has been pushed may count.
        """
        answer = digest(request.envelope)
        self._tell("sending", round=job.header.round, answer=answer.hex(), bytes=sizes(request))
        while True:
            reply = self._patient(job, lambda: self._calls.submit(request, timeout=SUBMIT_S))
            match reply.WhichOneof("what"):
                case "receipt":
                    return self._told(job, answer, reply.receipt)
                case "wanted":
                    for want in reply.wanted.parts:
                        if want.digest not in paths:
                            raise WireError("expected the server to want a part of the answer; it wants another")
                        self._push(job, answer, want, paths[want.digest])
                    if lasting is not None:
                        lasting.join()
                case "busy":
                    self._wait(job, reply.busy.retry_after_ms / 1000)
                case "refusal" if reply.refusal.reason in FATAL:
                    self._refuse(reply.refusal)
                case "refusal" if reply.refusal.passing:
                    self._tell("put off", round=job.header.round, reason=describe(reply.refusal))
                    self._wait(job, 1.0)
                case _:
                    self._tell(
                        "refused",
                        round=job.header.round,
                        reason=describe(reply.refusal),
                        code=code(reply.refusal.reason),
                    )
                    self._stop.wait(1.0)  # if it is asked again, the answer will be the same
                    return None

    def _told(self, job: Job, answer: bytes, receipt: pb.Envelope) -> pb.Envelope:
        """Return a receipt whose signature holds.

        Raises:
            WireError: if it is not the coordinator's, or of another answer.
        """
        header, _ = verify_envelope(receipt, self._coordinator)
        expect(header, kind=pb.RECEIPT, to=self._identity.name, run=job.header.run, order=job.order)
        if header.receipt.answer != answer:
            raise WireError("expected a receipt of this answer; got one of another")
        verdict = pb.Verdict.Name(header.receipt.verdict) if header.receipt.verdict in pb.Verdict.values() else "?"
        reason = describe(header.receipt.refusal) if header.receipt.HasField("refusal") else ""
        self._tell(
            "receipt",
            round=job.header.round,
            answer=answer.hex(),
            verdict=verdict,
            reason=reason,
            journal=header.receipt.journal_records,
            head=header.receipt.journal_head.hex(),
        )
        return receipt

    def _answer(self, order: pb.Header, digest: bytes, *, parts: Sequence[pb.Part]) -> pb.Header:
        """Return the header of an answer to an order."""
        return pb.Header(
            protocol=PROTOCOL,
            federation=order.federation,
            run=order.run,
            author=self._identity.name,
            kind=pb.ANSWER,
            round=order.round,
            recipe=order.recipe,
            base=order.base,
            state=order.state,
            order=digest,
            parts=parts,
            build=build(),
        )

    def _declined(self, job: Job, veto: pb.Veto, note: str) -> pb.SubmitRequest:
        header = self._answer(job.header, job.order, parts=())
        header.kind = pb.DECLINE
        header.decline.CopyFrom(pb.Decline(veto=veto, note=one_line(note, longest=500)))
        self._tell("declined", round=job.header.round, veto=pb.Veto.Name(veto), reason=one_line(note, longest=500))
        return pb.SubmitRequest(envelope=seal(header, self._identity.key))

    def _decline_unknown(self, job: Job) -> None:
        note = f"task {one_line(job.header.task)!r} is none that this release knows"
        self._deliver(job, self._declined(job, pb.TASK_UNKNOWN, note), {})

    def _request(self, header: pb.Header, paths: Mapping[bytes, Path]) -> pb.SubmitRequest:
        """Return a signed answer, with those of its parts that are small."""
        greeting, left = self._greeting, MOST_INLINE
        limit = greeting.limits.inline_bytes if greeting is not None else 0
        inline = []
        for one in header.parts:
            if one.num_bytes <= min(limit, left):
                inline.append(pb.Inline(digest=one.digest, data=paths[one.digest].read_bytes()))
                left -= one.num_bytes
        return pb.SubmitRequest(envelope=seal(header, self._identity.key), inline=inline)

    # ---- bytes ----

    def _fetch(self, job: Job, entry: Entry, one: pb.Part, inline: Mapping[bytes, bytes]) -> None:
        """Have a part of an order on the disk; a download that was cut goes on where it stood.

        Raises:
            WireError: if what comes is not what was signed, twice.
        """
        whole = entry.part(one.digest)
        if whole.exists():
            return
        if (data := inline.get(one.digest)) is not None and sha256(data).digest() == one.digest:
            with store_errors(whole):
                whole.write_bytes(data)
            return
        partial = whole.with_name(f"{whole.name}.part")
        for attempt in range(2):
            if self._download(job, one, partial) == one.digest:
                with store_errors(whole):
                    partial.replace(whole)
                self._tell("fetched", round=job.header.round, part=one.digest.hex(), bytes=one.num_bytes)
                return
            with store_errors(partial):
                partial.unlink()
            self._tell("spoilt", round=job.header.round, part=one.digest.hex(), attempt=attempt + 1)
        raise WireError(f"expected a part of digest {one.digest.hex()[:16]}; got other bytes twice")

    def _download(self, job: Job, one: pb.Part, partial: Path) -> bytes:
        """Fetch a part from where its file ends, and return the digest of it all."""
        found = hashlib.sha256()
        with store_errors(partial), partial.open("ab+") as file:
            file.seek(0)
            while block := file.read(BLOCK):
                found.update(block)
        while True:
            with store_errors(partial), partial.open("ab") as file:
                if file.tell() >= one.num_bytes:
                    return found.digest()
                try:
                    for chunk in self._calls.fetch(pb.FetchRequest(digest=one.digest, offset=file.tell())):
                        self._check(job)
                        if chunk.HasField("refusal"):
                            if chunk.refusal.reason in FATAL:
                                self._refuse(chunk.refusal)
                            if not chunk.refusal.passing:  # the order is not open, or not yet again: it comes once more
                                self._stop.wait(0.2)
                                raise StoppedError(describe(chunk.refusal))
                            break
                        if file.tell() + len(chunk.data) > one.num_bytes:
                            raise WireError(f"expected a part of {one.num_bytes} bytes, as signed; got more")
                        file.write(chunk.data)
                        found.update(chunk.data)
                except grpc.RpcError as error:
                    file.flush()
                    self._unreached(error, job)
                    continue
                if file.tell() >= one.num_bytes:
                    return found.digest()
            self._wait(job, 0.2)

    def _push(self, job: Job, answer: bytes, want: pb.Want, path: Path) -> None:
        """Send a part from where the server's ends; returns when it has come to an end, well or not."""
        greeting = self._greeting
        if greeting is None:
            self._wait(job, 0.2)
            return
        upload = Upload(path, answer, want, greeting.limits)
        try:
            for ack in self._calls.push(upload.parts()):
                self._check(job)
                if ack.HasField("refusal"):
                    self._tell("put off", round=job.header.round, reason=describe(ack.refusal))
                    if ack.refusal.reason in FATAL:
                        self._refuse(ack.refusal)
                    self._wait(job, 0.2)
                    return
                upload.acknowledge(ack.taken)
                if ack.complete:
                    self._tell("pushed", round=job.header.round, answer=answer.hex(), bytes=upload.sent - want.offset)
                    return
        except grpc.RpcError as error:
            self._tell("cut", round=job.header.round, answer=answer.hex(), bytes=upload.sent - want.offset)
            self._unreached(error, job)
        finally:
            upload.end()

    # ---- patience ----

    def _patient(self, job: Job, call: Callable[[], Reply]) -> Reply:
        """Return what a call gives, called again until it gives something."""
        while True:
            self._check(job)
            try:
                return call()
            except grpc.RpcError as error:
                self._unreached(error, job)

    def _check(self, job: Job | None) -> None:
        if self._stop.is_set() or (job is not None and job.over.is_set()):
            raise StoppedError("stopped")

    def _wait(self, job: Job, seconds: float) -> None:
        self._check(job)
        job.over.wait(seconds)
        self._check(job)

    def _pause(self, seconds: float) -> None:
        self._stop.wait(seconds)

    def _reached(self) -> None:
        now = self._clock()
        self._unreached_since = None
        if self._failures and now - self._good_since > GOOD_S:
            self._failures = 0
        if self._told_at > float("-inf"):
            self._tell("reached", server=self._settings.address)
            self._told_at = float("-inf")

    def _unreached(self, error: grpc.RpcError, job: Job | None = None) -> None:
        """Wait before a call is made again.

        Raises:
            ConfigError: if no repetition can help.
        """
        self._check(job)
        now, status, details = self._clock(), error.code(), error.details()
        if status not in PASSING:
            raise ConfigError(Fault("link.address", "a fedtune server", f"{status.name}: {one_line(details or '')}"))
        self._good_since = now
        if self._unreached_since is None:
            self._unreached_since = now
        if job is None and now - self._told_at >= TELL_EACH_S:
            self._told_at = now
            found = diagnose(self._identity, self._settings)
            if found.permanent:
                raise ConfigError(Fault("link.address", "a server of this federation", found.reason))
            self._tell("unreached", server=self._settings.address, reason=found.reason)
        if self._settings.patience_s and now - self._unreached_since > self._settings.patience_s:
            waited = f"{now - self._unreached_since:.0f} s without a connection"
            raise ConfigError(Fault("link.address", "a server that can be reached", waited, "start join again later"))
        self._failures = min(self._failures + 1, 30)
        limit = min(self._settings.backoff_cap_s, self._settings.backoff_s * 2.0 ** min(self._failures - 1, 10))
        share = int.from_bytes(os.urandom(4), "little") / 2**32
        (job.over if job is not None else self._stop).wait(share * limit)
        self._check(job)

    def _refuse(self, refusal: pb.Refusal) -> None:
        """Act on a refusal of this site as such: wait if it may pass.

        Raises:
            ConfigError: if somebody must act.
        """
        self._tell("refused", reason=describe(refusal), code=code(refusal.reason))
        if not refusal.passing:
            raise ConfigError(Fault("", "a server that takes this site", describe(refusal)))
        self._pause(1.0)
        self._check(None)

    # ---- who is who ----

    def _coordinator(self, key: bytes) -> Party | None:
        roster = self._roster.current()
        if self._now() > roster.valid_until:  # what it says of anybody counts no more
            return None
        member = by_key_id(roster, key)
        return member if member is not None and member.role == "coordinator" else None

    def _take_roster(self, data: bytes) -> None:
        """Take a newer roster, which the server only carries."""
        held = self._roster.current()
        try:
            found = newer(held, decode(data, self._identity.root), now=int(self._now()))
        except WireError as error:
            self._tell("refused", reason=one_line(str(error)), code="ROSTER")
            return
        write_bytes(self._identity.folder / "roster", data)
        self._tell("roster", version=found.version)


class Upload:
    """A part on its way up: no more than a window of it is under way."""

    def __init__(self, path: Path, answer: bytes, want: pb.Want, limits: pb.Limits) -> None:
        self._path, self._answer, self._want, self._limits = path, answer, want, limits
        self.sent = self._taken = want.offset
        self._news, self._over = threading.Condition(), False

    def parts(self) -> Iterator[pb.PushPart]:
        """Yield the messages; waits for acknowledgements when the window is full."""
        with self._path.open("rb") as file:
            file.seek(self._want.offset)
            first = pb.PushPart(answer=self._answer, digest=self._want.digest, offset=self._want.offset)
            more = True
            while not self._over and more:
                first.data = file.read(self._limits.part_bytes)
                self.sent += len(first.data)
                more = len(first.data) == self._limits.part_bytes
                yield first  # also without data: a server that has all of it, from before a restart, looks at it then
                first = pb.PushPart()
                with self._news:
                    while not self._over and self.sent - self._taken > self._limits.window_bytes:
                        self._news.wait(1.0)

    def acknowledge(self, taken: int) -> None:
        with self._news:
            self._taken = taken
            self._news.notify_all()

    def end(self) -> None:
        with self._news:
            self._over = True
            self._news.notify_all()


def store_answer(entry: Entry, request: pb.SubmitRequest) -> None:
    """Make an answer durable: its update first."""
    outbox.settle(entry.update)
    entry.keep_answer(request)


def file_sha256(path: Path) -> bytes:
    """Return the SHA-256 of a file."""
    found = sha256()
    with store_errors(path), path.open("rb") as file:
        while block := file.read(BLOCK):
            found.update(block)
    return found.digest()


def sizes(request: pb.SubmitRequest) -> int:
    """Return the bytes of an answer's parts."""
    return sum(one.num_bytes for one in pb.Header.FromString(request.envelope.header).parts)
