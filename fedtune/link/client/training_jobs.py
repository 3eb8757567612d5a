"""What a client does for its tasks: send its profile, or check the policy, fetch, train, and deliver the update."""

from __future__ import annotations

import shutil
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

import grpc

from fedtune.errors import ClientError, ConfigError, StoreError, WireError
from fedtune.link.audit_log import RecordEvent
from fedtune.link.client import outbox, policy
from fedtune.link.client.cohort import cohort_violations
from fedtune.link.client.delivery import Delivery
from fedtune.link.client.device_watch import DeviceWatch
from fedtune.link.client.downloads import Downloads, hash_file
from fedtune.link.client.jobs import Job, StoppedError, ThreadGuard
from fedtune.link.client.outbox import Entry
from fedtune.link.client.policy import OrderCheck, PolicyViolation, Usage
from fedtune.link.client.replies import is_decline, reply_bytes, reply_header, sign_decline, sign_reply
from fedtune.link.client.round_texts import format_scores, format_work, verdict_text
from fedtune.link.client.session import Greeting, Session
from fedtune.link.client.socket_bytes import SocketBytes, SocketMeter
from fedtune.link.client.training_process import Trainer
from fedtune.link.envelopes import TRAIN, UPDATE, make_part
from fedtune.link.provenance import verify_folder
from fedtune.link.rejections import one_line, veto_name
from fedtune.link.settings import MIB, Policy
from fedtune.link.uploads import free_bytes
from fedtune.store import manifest
from fedtune.store.files import make_private, store_errors, write_private
from fedtune.wire.codec import MAX_HEADER_BYTES
from fedtune.wire.profile import decode_terms
from fedtune.wire.v1 import link_pb2 as pb

Work: TypeAlias = Callable[[Path, Sequence[str], Path], Mapping[str, float]]
"""What a trainer does with the files of a task."""


class TrainingJobs:
    """The work of a client, called in the threads of its jobs."""

    def __init__(
        self,
        session: Session,
        downloads: Downloads,
        delivery: Delivery,
        guard: ThreadGuard,
        device: DeviceWatch,
        meter: SocketMeter,
        rules: Policy,
        state: Path,
        trainer: Trainer,
        *,
        check: OrderCheck,
        record: RecordEvent,
        clock: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        """Bind what the work needs.

        Args:
            session: with the server.
            downloads: parts of tasks.
            delivery: of replies.
            guard: starts threads.
            device: says whether the machine may work.
            meter: counts the bytes of the connections.
            rules: what the site allows.
            state: folder of the outbox.
            trainer: trains.
            check: holds orders against the recipe that the site has accepted.
            record: receives the events.
            clock: seconds from any start.
            now: seconds since 1970.
        """
        self._session, self._downloads, self._delivery, self._guard = session, downloads, delivery, guard
        self._device, self._rules, self._state, self._trainer = device, rules, state, trainer
        self._meter, self._metered = meter, SocketBytes()
        self._check, self._record, self._clock, self._now = check, record, clock, now
        self._work_texts: dict[bytes, str] = {}  # by task, until its receipt is here
        # Also set when loading has failed, or the job of a hello would wait for ever.
        self._profile_ready = threading.Event()

    def load(self) -> None:
        """Load base and data, and write the profile that answers hellos; before that the machine must be ready."""
        if not self._device.wait():
            return
        folder = self._state / "profile"
        # A profile of an earlier start may be of other data.
        shutil.rmtree(folder, ignore_errors=True)
        with store_errors(folder):
            make_private(folder, below=self._state)
        began = self._clock()
        try:
            self._trainer.profile(folder)
            self._record("loaded", seconds=int(self._clock() - began))
        finally:
            self._profile_ready.set()

    def send_profile(self, job: Job, task: pb.Envelope, inline: Mapping[bytes, bytes]) -> None:
        """Reply to a hello, with the class names that it asks for."""
        while not self._profile_ready.wait(1.0):
            job.check()
        folder = self._state / "profile"
        if labels := self._read_terms(job, task, inline):
            folder = self._state / "profile-labels"
            shutil.rmtree(folder, ignore_errors=True)
            with store_errors(folder):
                make_private(folder, below=self._state)
            try:
                self._trainer.profile(folder, labels)
            except ConfigError as error:  # of these classes: the federation can go on without this site
                self._delivery.deliver(job, self._decline(job, pb.WORK_FAILED, str(error)), {})
                return
        with store_errors(folder):
            contents = {path.name: path.read_bytes() for path in folder.iterdir()}
        parts = {"" if name == "front" else name: data for name, data in contents.items()}
        header = reply_header(self._session.identity, job, [make_part(key, parts[key]) for key in sorted(parts)])
        paths = {sha256(data).digest(): folder / name for name, data in contents.items()}
        job.leaving = True
        self._delivery.deliver(job, self._sign(header, paths), paths)

    def _read_terms(self, job: Job, task: pb.Envelope, inline: Mapping[bytes, bytes]) -> Sequence[str]:
        """Return the class names that a hello asks for; none: the site uses its own."""
        front = next((part for part in job.header.parts if not part.key), None)
        if front is None or not front.num_bytes or front.num_bytes > MAX_HEADER_BYTES:
            return ()
        entry = outbox.open_entry(self._state, task, job.header)
        self._downloads.fetch(job, entry, front, inline)
        with store_errors(entry.folder):
            labels = decode_terms(entry.part(front.digest).read_bytes())
        shutil.rmtree(entry.folder, ignore_errors=True)
        return labels

    def decline_unknown(self, job: Job) -> None:
        """Reply to a task that only another release knows."""
        note = f"task {one_line(job.header.task)!r} is none that this release knows"
        self._delivery.deliver(job, self._decline(job, pb.TASK_UNKNOWN, note), {})

    def train(self, job: Job, task: pb.Envelope, inline: Mapping[bytes, bytes]) -> None:
        """Do a task of a round, or send again what was made for it before a restart."""
        greeting = self._session.greeting
        assert greeting is not None
        entry = outbox.open_entry(self._state, task, job.header)
        total = sum(part.num_bytes for part in job.header.parts)
        self._record("asked", round=job.header.round, order=job.task.hex(), bytes=total)
        if (stored := entry.reply()) is not None:
            self._send(job, entry, stored)
            return
        outbox.remove_earlier_bodies(self._state, job.header.run, keep=entry)
        request = self._attempt(job, lambda: self._make_reply(job, entry, inline, greeting))
        # A withdrawn job fails as well, since its trainer was killed: that is no decline to send.
        job.check()
        if is_decline(request):
            # Not stored: when asked again, what failed may be mended.
            self._delivery.deliver(job, request, {})
            return
        if request.inline or not entry.update.exists():
            entry.store_reply(request)
            self._send(job, entry, request)
            return
        # The disk works beside the network. Pushed bytes alone count for nothing: until the reply is submitted as
        # whole, which waits for this thread, a crash may lose it and another one may take its place.
        durable = self._guard.start(lambda: entry.store_reply_and_update(request), name="fedtune disk")
        try:
            self._send(job, entry, request, durable=durable)
        finally:
            durable.join()

    def resend(self, job: Job, entry: Entry) -> None:
        """Send a stored reply that has no receipt yet."""
        request = entry.reply()
        assert request is not None
        self._send(job, entry, request)

    def score(self, job: Job, task: pb.Envelope, inline: Mapping[bytes, bytes]) -> None:
        """Score a global model on the rows that the site holds out, as far as its policy allows."""
        greeting = self._session.greeting
        assert greeting is not None
        if self._rules.scores == "refuse":
            note = "policy.scores: this site refuses to score"
            self._delivery.deliver(job, self._decline(job, pb.SCORES_NOT_ALLOWED, note), {})
            return
        entry = outbox.open_entry(self._state, task, job.header)
        request = self._attempt(job, lambda: self._make_scores(job, entry, inline, greeting))
        job.check()
        job.leaving = True
        paths = {part.digest: entry.update for part in pb.Header.FromString(request.envelope.header).parts}
        self._delivery.deliver(job, request, {} if request.inline else paths)
        # Asked again, it would be scored again: the model is as large as an update, and the answer is a few bytes.
        shutil.rmtree(entry.folder, ignore_errors=True)

    def receive_result(self, job: Job, task: pb.Envelope, inline: Mapping[bytes, bytes]) -> None:
        """Fetch the result of the run, put it into the run's folder at this site, and say that it is here."""
        entry = outbox.open_entry(self._state, task, job.header)
        violation = policy.check_result(self._rules, job.header, free=self._free_bytes())
        if violation is None:
            violation = next(iter(self._recipe_violations(job, b"")), None)
        if violation is not None:
            request = self._decline(job, violation.veto, violation.note)
        else:
            request = self._store_result(job, entry, inline)
        job.leaving = True
        self._delivery.deliver(job, request, {})
        shutil.rmtree(entry.folder, ignore_errors=True)

    def _store_result(self, job: Job, entry: Entry, inline: Mapping[bytes, bytes]) -> pb.SubmitRequest:
        """Fetch and verify the files, and return the signed reply: that they are here, or why they are not."""
        for part in job.header.parts:
            self._downloads.fetch(job, entry, part, inline)
        remarks = list[str]()
        try:
            folder = outbox.store_result(self._state, entry, lambda path: remarks.append(self._check_result(path)))
        except StoreError as error:
            return self._decline(job, pb.WORK_FAILED, str(error))
        total = sum(part.num_bytes for part in job.header.parts)
        unverified = {"unverified": remarks[0]} if remarks[0] else {}
        self._record("result", round=job.header.round, path=str(folder), bytes=total, **unverified)
        return self._sign(reply_header(self._session.identity, job, ()), {})

    def _check_result(self, folder: Path) -> str:
        """Verify the files of a result and who signed them; return why that is not known of those of 0.2.0."""
        opened = manifest.open_folder(folder)
        if opened.listed is None:
            return f"written by fedtune {opened.facts.get('fedtune')}, which signed no results"
        verify_folder(folder, self._session.roster(), now=int(self._now()))
        return ""

    def _free_bytes(self) -> int:
        """Return how many bytes may be written without taking what must stay free of this site's disk."""
        return free_bytes(self._state) - self._rules.min_free_mib * MIB

    def _make_scores(
        self, job: Job, entry: Entry, inline: Mapping[bytes, bytes], greeting: Greeting
    ) -> pb.SubmitRequest:
        """Return the signed scores, or the statement that they stay here."""
        usage = Usage(day_bytes=self._usage(job.header.run).day_bytes)
        if (declined := self._fetch_allowed(job, entry, inline, greeting, usage)) is not None:
            return declined
        scores = self._perform(job, entry, self._trainer.score)
        self._record("scored", round=job.header.round, scores=format_scores(scores))
        if self._rules.scores == "keep":
            return self._decline(job, pb.SCORES_NOT_ALLOWED, "policy.scores: this site keeps its scores")
        return self._sign_update(job, entry)

    def _make_reply(
        self, job: Job, entry: Entry, inline: Mapping[bytes, bytes], greeting: Greeting
    ) -> pb.SubmitRequest:
        """Check a task against the policy before it is fetched whole, train, and return the signed reply."""
        usage = replace(self._usage(job.header.run), answers=outbox.count_answers(self._state, job.header))
        if (declined := self._fetch_allowed(job, entry, inline, greeting, usage)) is not None:
            return declined
        measured = self._perform(job, entry, self._trainer.perform)
        size = entry.update.stat().st_size
        # The size is known only now; an update over the limit is removed at once and never sent.
        if (violation := policy.check_upload(self._rules, size, usage)) is not None:
            entry.update.unlink()
            return self._decline(job, violation.veto, violation.note)
        rank = policy.read_demand(job.header, (entry.folder / "front").read_bytes()).rank
        self._work_texts[job.task] = format_work(measured, rank)
        return self._sign_update(job, entry)

    def _fetch_allowed(
        self, job: Job, entry: Entry, inline: Mapping[bytes, bytes], greeting: Greeting, usage: Usage
    ) -> pb.SubmitRequest | None:
        """Fetch a task whole if the policy allows it; otherwise return the signed statement that it does not."""
        front = next((part for part in job.header.parts if not part.key), None)
        if front is None or front.num_bytes > MAX_HEADER_BYTES:
            raise WireError(f"expected a task with an assignment of at most {MAX_HEADER_BYTES} bytes; got another")
        # Only the assignment at first: a task that the policy forbids costs no download.
        self._downloads.fetch(job, entry, front, inline)
        data = entry.part(front.digest).read_bytes()
        demand = policy.read_demand(job.header, data)
        # Before the wait for base and data, which are not loaded either before the machine may work.
        if obstacle := self._device.obstacle():
            return self._decline(job, pb.DEVICE_NOT_READY, f"this device is {obstacle}")
        # The site's own examples and layers bound what it may be asked.
        while not self._profile_ready.wait(1.0):
            job.check()
        local_time = datetime.fromtimestamp(self._now()).time()
        recipe_digest = greeting.recipe_digest.hex()
        violations = [*policy.check_policy(self._rules, demand, recipe_digest, usage, now=local_time)]
        violations += self._recipe_violations(job, data)
        if job.header.task == TRAIN:
            violations += self._cohort_violations(job)
        if violations:
            return self._decline(job, violations[0].veto, "; ".join(violation.note for violation in violations))
        if (free := self._free_bytes()) < demand.num_bytes:
            note = f"{demand.num_bytes} bytes do not fit the disk, where {free} may be written and the rest stays free"
            return self._decline(job, pb.TOO_MANY_BYTES, note)
        for part in job.header.parts:
            self._downloads.fetch(job, entry, part, inline)
        with store_errors(entry.folder):
            write_private(entry.folder / "front", entry.part(front.digest).read_bytes())
        return None

    def _cohort_violations(self, job: Job) -> Sequence[PolicyViolation]:
        """Return what is wrong with the cohort of an order, by the newest roster that can be had."""
        check = partial(cohort_violations, job.header, own=self._session.identity.name, least=self._rules.min_cohort)
        violations = check(roster=self._session.roster(), now=self._now())
        if any(violation.veto == pb.COHORT_UNKNOWN for violation in violations):
            # A member may have been enrolled since; the authority has signed that roster, too.
            with suppress(grpc.RpcError, ValueError):  # ValueError: the channel was closed
                self._session.follow_roster()
            violations = check(roster=self._session.roster(), now=self._now())
        return violations

    def _recipe_violations(self, job: Job, front: bytes) -> Sequence[PolicyViolation]:
        """Return why an order is none that the accepted recipe permits, or that this site does."""
        greeting = self._session.greeting
        assert greeting is not None
        return self._check(greeting, job.header, front)

    def _attempt(self, job: Job, make: Callable[[], pb.SubmitRequest]) -> pb.SubmitRequest:
        """Return the reply that `make` makes, or where that fails, for any reason, the statement that it will not come.

        Raises:
            StoppedError: if the job should give up.
            ConfigError: if the server does not take this client.
            StoreError: if this site's disk fails: the client ends.
        """
        try:
            return make()
        except (StoppedError, ConfigError, StoreError):
            raise
        except (ClientError, WireError) as error:
            return self._decline(job, pb.WORK_FAILED, str(error))
        except BaseException as error:
            # Of a channel that was closed: the client ends, and declines nothing.
            job.check()
            # A round must not wait for a site that works on nothing. The text may quote data: its type alone leaves.
            traceback.print_exc()
            note = f"expected an answer; got {type(error).__name__}; this site's own log says where"
            return self._decline(job, pb.WORK_FAILED, note)

    def _perform(self, job: Job, entry: Entry, work: Work) -> Mapping[str, float]:
        """Have the trainer write its result; `training` tells the client that a withdrawal must kill it."""
        bodies = [part.digest.hex() for part in job.header.parts if part.key]
        job.training = True
        job.begin(pb.Progress.WORKING)
        try:
            measured = work(entry.folder, bodies, entry.update)
        finally:
            job.training = False
        # Its folder is private already; the file is so wherever it is moved, too.
        with store_errors(entry.update):
            entry.update.chmod(0o600)
        return measured

    def _sign_update(self, job: Job, entry: Entry) -> pb.SubmitRequest:
        """Return the signed reply whose part is what the trainer wrote."""
        digest, size = hash_file(entry.update).digest(), entry.update.stat().st_size
        header = reply_header(self._session.identity, job, [pb.Part(key=UPDATE, digest=digest, num_bytes=size)])
        return self._sign(header, {digest: entry.update})

    def _usage(self, run: str) -> Usage:
        """Return what the site has done already; the outbox is read only for the limits that are set."""
        rules, now = self._rules, self._now()
        return Usage(
            rounds=outbox.count_replies(self._state, run) if rules.max_rounds is not None else 0,
            day_bytes=outbox.bytes_sent_last_day(self._state, now=now) if rules.day_up_mib is not None else 0,
        )

    def _send(
        self, job: Job, entry: Entry, request: pb.SubmitRequest, *, durable: threading.Thread | None = None
    ) -> None:
        """Send a reply until there is a receipt, and store that."""
        header = pb.Header.FromString(request.envelope.header)
        paths = {} if request.inline else {part.digest: entry.update for part in header.parts}
        receipt = self._delivery.deliver(job, request, paths, durable=durable)
        if receipt is not None:
            entry.store_receipt(receipt)
            self._record_round(job, request, receipt)

    def _record_round(self, job: Job, request: pb.SubmitRequest, receipt: pb.Envelope) -> None:
        """Record a round of this site in one event: what it trained, how far, for how long, and what travelled."""
        # Not after a restart: what was measured before it is not known any more.
        if (work := self._work_texts.pop(job.task, None)) is not None:
            verdict = verdict_text(pb.Header.FromString(receipt.header).receipt.verdict)
            up, down = reply_bytes(request), sum(part.num_bytes for part in job.header.parts)
            line = self._line_bytes()
            self._record("trained", round=job.header.round, work=work, up=up, down=down, verdict=verdict, **line)

    def _line_bytes(self) -> Mapping[str, int]:
        """Return what the connections have moved since the round before; nothing where the system does not say."""
        if (total := self._meter.read()) is None:
            return {}
        moved, self._metered = total - self._metered, total
        return {"line_up": moved.up, "line_down": moved.down}

    def _sign(self, header: pb.Header, paths: Mapping[bytes, Path]) -> pb.SubmitRequest:
        greeting = self._session.greeting
        # Without a server at the moment its limit is not known, and nothing travels inline.
        inline_bytes = greeting.limits.inline_bytes if greeting is not None else 0
        return sign_reply(self._session.identity, header, paths, inline_bytes=inline_bytes)

    def _decline(self, job: Job, veto: pb.Veto, note: str) -> pb.SubmitRequest:
        text = one_line(note, longest=500)
        self._record("declined", round=job.header.round, veto=veto_name(veto), reason=text)
        return sign_decline(self._session.identity, job, veto, note)
