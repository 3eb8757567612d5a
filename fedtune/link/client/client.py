"""A client of the link: it dials the server, asks for tasks, and has each done in a thread until the run is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import grpc

from fedtune.errors import ClientError, ConfigError, Fault, WireError
from fedtune.link.audit_log import RecordEvent, ignore_event
from fedtune.link.client import outbox
from fedtune.link.client.backoff import Backoff
from fedtune.link.client.bandwidth import Bandwidth, check_limits
from fedtune.link.client.channel import LinkStub, dial
from fedtune.link.client.conditions import Conditions
from fedtune.link.client.delivery import Delivery
from fedtune.link.client.device_watch import DeviceWatch
from fedtune.link.client.downloads import Downloads
from fedtune.link.client.jobs import Job, StoppedError, ThreadGuard
from fedtune.link.client.policy import OrderCheck
from fedtune.link.client.renewal import Renewal
from fedtune.link.client.route import Diagnosis, diagnose, proxy_fault
from fedtune.link.client.session import CALL_S, Greeting, Session
from fedtune.link.client.socket_bytes import SocketMeter, dialled_port
from fedtune.link.client.training_jobs import TrainingJobs
from fedtune.link.client.training_process import Trainer
from fedtune.link.envelopes import EVALUATE, HELLO, RESULT, TRAIN, digest, expect_fields, verify_envelope
from fedtune.link.pki.identity import Identity, renewed_identity
from fedtune.link.pki.roster import RosterFile
from fedtune.link.rejections import RejectionError, describe, one_line, reason_name
from fedtune.link.settings import JoinSettings, Policy
from fedtune.wire.v1 import link_pb2 as pb

COMPLETE_S = 30.0
"""Without a server, after which a site whose last run is complete ends: nothing is left for it to do."""
MAX_PAUSE_S = 60.0
"""Longest pause that a server may ask for: it must not silence a site for weeks."""
WATCH_S = 10.0
DAY_S = 24 * 3600.0
UNVERIFIED_PAUSE_S = 1.0
"""After a task whose signature does not hold, or that failed: the server offers it again at once."""
End = Literal["finished", "stopped"]


class Client:
    """A site in a federation; `run` returns when the run is over or `stop` is called."""

    def __init__(
        self,
        identity: Identity,
        roster: RosterFile,
        settings: JoinSettings,
        rules: Policy,
        state: Path,
        trainer: Trainer,
        *,
        check: OrderCheck,
        record: RecordEvent = ignore_event,
        agree: Callable[[Greeting], bool] = lambda greeting: True,
        conditions: Conditions | None = None,
        meter: SocketMeter | None = None,
        each_second: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Bind a site; nothing is connected yet.

        Args:
            identity: keys and certificate of the site.
            roster: keys of the other parties.
            settings: address of the server, pauses and patience.
            rules: what the site allows.
            state: folder of its outbox.
            trainer: trains.
            check: holds orders against the recipe that the site has accepted.
            record: receives the events.
            agree: asked before the site takes part in a run.
            conditions: of the machine's work; None: the limits of `rules` on this machine.
            meter: counts the bytes of its connections; None: one of its own.
            each_second: called while the client runs.
            clock: seconds from any start.
            now: seconds since 1970.
        """
        self._identity, self._settings, self._state, self._trainer = identity, settings, state, trainer
        self._record, self._agree, self._clock = record, agree, clock
        self._stop = threading.Event()
        self._calls: LinkStub = dial(identity, settings)
        self._guard = ThreadGuard(self._stop, self._calls.close)
        self._backoff = Backoff(identity, settings, stop=self._stop, record=record, clock=clock)
        self._up, self._down = Bandwidth(settings.max_up_kib_s), Bandwidth(settings.max_down_kib_s)
        self._meter = meter or SocketMeter(dialled_port(settings))
        self._device = DeviceWatch(
            conditions or Conditions(rules, state),
            stop=self._stop,
            record=record,
            after_look=lambda: (self._meter.read(), each_second()),
        )
        self._session = Session(
            identity, roster, self._calls, self._backoff, record=record, now=now, clock=clock, redial=self._redial
        )
        self._renewal = Renewal(identity, self._calls, record=record, clock=clock, now=now)
        self._work = TrainingJobs(
            self._session,
            Downloads(self._calls, self._backoff, self._down, record=record),
            Delivery(self._session, self._calls, self._backoff, self._up, record=record),
            self._guard,
            self._device,
            self._meter,
            rules,
            state,
            trainer,
            check=check,
            record=record,
            clock=clock,
            now=now,
        )
        self._jobs: dict[bytes, Job] = {}  # by task digest
        self._lock = threading.Lock()  # of the jobs
        self._dropped: list[pb.Dropped] = []  # the task that was offered last, if it is not believed

    def stop(self) -> None:
        """End soon: work under way is given up, and what the outbox holds is sent after the next start."""
        self._stop.set()
        # Ends the call in which the main loop waits, which the server may hold for `hold_s`.
        self._calls.close()

    def greet(self) -> Greeting:
        """Say hello once and return what the server says, without taking part.

        Raises:
            ConfigError: if the server cannot be reached or does not take this site.
        """
        if (fault := proxy_fault(self._settings)) is not None:
            raise self._no_answer(fault)
        try:
            return self._session.hello(wait=False)
        except grpc.RpcError as error:
            raise self._no_answer(diagnose(self._identity, self._settings)) from error

    def _no_answer(self, why: Diagnosis) -> ConfigError:
        got = f"{self._settings.address}: {why.reason}"
        return ConfigError(Fault("link.address", "a server that answers", got))

    def run(self) -> End:
        """Take part until the run is over.

        Raises:
            ConfigError: if something must be changed before this can succeed.
            StoreError: if the outbox cannot be written.
        """
        complete = outbox.complete_run(self._state)
        self._guard.start(self._device.run, name="fedtune device")
        self._guard.start(self._work.load, name="fedtune load")
        self._guard.start(self._watch, name="fedtune watch")
        try:
            while not self._stop.is_set():
                if self._guard.fault is not None:
                    raise self._guard.fault
                try:
                    if self._session.greeting is None:
                        if (unreached := proxy_fault(self._settings)) is not None:
                            self._backoff.wait_without_way(unreached)
                            continue
                        self._begin(self._session.hello())
                        complete = ""
                    if (end := self._turn()) is not None:
                        return end
                    self._backoff.note_success()
                except (grpc.RpcError, ValueError) as error:
                    # The thread of the fault has closed the channel, which failed this call. Its own cause stays: by
                    # that of a full disk a command knows that another try may succeed.
                    if (fault := self._guard.fault) is not None:
                        raise fault from fault.__cause__
                    # What gRPC raises on a channel that `stop` has closed, or the watch in favour of another one.
                    if isinstance(error, ValueError):
                        continue
                    self._backoff.wait_after_error(error)
                    if complete and self._backoff.unreachable_s >= COMPLETE_S:
                        self._record("over", run=complete, seconds=int(COMPLETE_S))
                        return "finished"
            return "stopped"
        except StoppedError:
            return "stopped"
        finally:
            self._stop.set()
            for job in self._jobs.values():
                job.over.set()
            # What it has not finished is trained again from the same seed, and nothing of it has left the site.
            self._trainer.kill()
            self._calls.close()

    def _watch(self) -> None:
        """Look every few seconds at what a long connection would miss: dates, and the server's place in the roster."""
        warned = dict[str, float]()
        while not self._stop.wait(WATCH_S):
            # First: what can be renewed at once is no news.
            if self._session.greeting is not None:
                self._renewal.look()
            for text in self._session.warnings():
                if self._clock() - warned.get(text, float("-inf")) >= DAY_S:
                    warned[text] = self._clock()
                    self._record("warning", text=text)
            fault, renewed = self._session.server_fault(), renewed_identity(self._identity)
            if fault or renewed is not None:
                self._identity = renewed or self._identity
                self._record("redial", reason=fault or "this site has a new certificate")
                self._session.greeting = None
                self._redial()

    def _redial(self) -> None:
        """Leave the connection to the server for another one."""
        self._meter.read()  # what it has moved cannot be read any more when it is closed
        self._calls.redial(dial(self._identity, self._settings))

    def _begin(self, greeting: Greeting) -> None:
        """Take part in a run, or resume it: stored replies without a receipt are sent first."""
        if self._stop.is_set():
            return
        check_limits(self._settings, greeting.limits)
        # A restarted client does not ask its operator again; with another recipe it is another run to a site.
        is_known = outbox.accepted_recipe(self._state, greeting.run) == greeting.recipe
        self._record(
            "hello",
            server=self._settings.address,
            run=greeting.run,
            recipe=greeting.recipe_digest.hex(),
            going_on=int(is_known),
        )
        if not is_known and not self._agree(greeting):
            raise StoppedError("the operator of the site did not agree to the recipe")
        outbox.store_plan(self._state, greeting.run, greeting.plan, greeting.recipe)
        with self._lock:
            for job in self._jobs.values():
                # The address serves another run: it would refuse a reply to this one.
                if job.header.run != greeting.run:
                    self._withdraw(job)
        self._session.greeting = greeting
        for entry in outbox.load_entries(self._state, greeting.run):
            if entry.reply() is not None and entry.receipt() is None and entry.digest not in self._jobs:
                self._start(entry.digest, entry.header, self._work.resend, entry)

    def _turn(self) -> End | None:
        """Ask for work once, and begin it; returns how the run ended, if it has."""
        greeting = self._session.greeting
        assert greeting is not None
        with self._lock:
            holding, progress = list(self._jobs), [self._progress(job) for job in self._jobs.values()]
        # The server names those of the held tasks that it has closed, and offers none of them again.
        request = pb.NextRequest(
            epoch=greeting.epoch,
            holding=holding,
            process=self._session.process,
            roster_version=self._session.roster_version,
            progress=progress,
            dropped=self._dropped,
        )
        reply = self._calls.next(request, timeout=greeting.limits.hold_ms / 1000 + CALL_S)
        self._up.take(request.ByteSize())
        self._down.take(reply.ByteSize())
        # Before anything of the reply is verified: it may be signed by a key that only the newer roster names.
        self._session.hear_version(reply.roster_version)
        self._session.follow_roster()
        match reply.WhichOneof("what"):
            case "work":
                self._begin_task(greeting, reply.work)
            case "withdrawn":
                with self._lock:
                    if (job := self._jobs.get(reply.withdrawn.order)) is not None:
                        self._withdraw(job)
            case "stop" if reply.stop.why == pb.Stop.FINISHED and not self._believes_end(greeting, reply.stop):
                self._stop.wait(UNVERIFIED_PAUSE_S)
            case "stop" if reply.stop.why == pb.Stop.FINISHED:
                outbox.store_end(self._state, greeting.run)
                self._record("finished", run=greeting.run)
                return "finished"
            case "stop":
                self._record("draining", run=greeting.run)
                self._session.greeting = None
                self._stop.wait(min(MAX_PAUSE_S, reply.stop.retry_after_ms / 1000))
            case "refusal" if reply.refusal.reason == pb.STALE_EPOCH:
                self._session.greeting = None
            case "refusal":
                self._backoff.wait_after_refusal(reply.refusal)
            case _:
                self._stop.wait(min(MAX_PAUSE_S, reply.wait.retry_after_ms / 1000))
        return None

    def _believes_end(self, greeting: Greeting, stop: pb.Stop) -> bool:
        """Return whether the coordinator has signed that the run is complete, in this process of its server."""
        try:
            header, _ = verify_envelope(stop.end, self._session.find_coordinator)
            expect_fields(header, federation=self._identity.federation, run=greeting.run, kind=pb.END)
            expect_fields(header, to=self._identity.name, recipe=greeting.recipe_digest, epoch=greeting.epoch)
        except RejectionError as error:
            self._drop(pb.Dropped(order=digest(stop.end), reason=error.refusal.reason), describe(error.refusal))
            return False
        return True

    def _begin_task(self, greeting: Greeting, work: pb.Work) -> None:
        """Begin a task of any kind; one whose signature or fields do not hold is recorded and dropped."""
        try:
            header, _ = verify_envelope(work.order, self._session.find_coordinator)
            expect_fields(header, federation=self._identity.federation, run=greeting.run, kind=pb.ORDER)
            expect_fields(header, to=self._identity.name, recipe=greeting.recipe_digest)
        except RejectionError as error:
            self._drop(pb.Dropped(order=digest(work.order), reason=error.refusal.reason), describe(error.refusal))
            self._stop.wait(UNVERIFIED_PAUSE_S)
            return
        self._dropped = []
        task, inline = digest(work.order), {part.digest: part.data for part in work.inline}
        if task in self._jobs:
            return
        if header.task == HELLO:
            self._start(task, header, self._work.send_profile, work.order, inline)
        elif header.task == TRAIN and header.round > 0:
            self._start(task, header, self._work.train, work.order, inline)
        elif header.task == EVALUATE:
            self._start(task, header, self._work.score, work.order, inline)
        elif header.task == RESULT:
            self._start(task, header, self._work.receive_result, work.order, inline)
        else:
            self._start(task, header, self._work.decline_unknown)

    def _progress(self, job: Job) -> pb.Progress:
        """Return how far a job is."""
        phase, done, total, cpu_ms = job.phase, job.done_bytes, job.total_bytes, 0
        if job.training:
            work = self._trainer.progress()
            done, total, cpu_ms = work.done, work.total, work.cpu_ms
            phase = pb.Progress.WAITING if work.obstacle else phase
        return pb.Progress(order=job.task, phase=phase, done=done, total=total, cpu_ms=cpu_ms)

    def _drop(self, dropped: pb.Dropped, reason: str) -> None:
        """Do nothing for a task that is not believed, and have the server know with the next call."""
        # The server offers it again at once, and what it brings is no news.
        if dropped not in self._dropped:
            self._record("refused", reason=reason, code=reason_name(dropped.reason))
        self._dropped = [dropped]

    def _start(self, task: bytes, header: pb.Header, work: Callable[..., None], *args: Any) -> None:
        """Do the work of a task in a thread of its own."""
        job = Job(task, header, self._stop)
        with self._lock:
            self._jobs[task] = job

        def run() -> None:
            try:
                work(job, *args)
            except StoppedError:
                pass
            except (WireError, ClientError) as error:  # bytes from outside cost this task alone, not the client
                self._record("failed", round=job.header.round, reason=one_line(str(error), longest=500))
                self._stop.wait(UNVERIFIED_PAUSE_S)
            finally:
                with self._lock:
                    self._jobs.pop(task, None)

        self._guard.start(run, name=f"fedtune round {header.round}" if header.round else "fedtune hello")

    def _withdraw(self, job: Job) -> None:
        """Give up a job whose reply is of no use any more; called with the lock held."""
        if not job.over.is_set() and not job.leaving:
            job.over.set()
            self._record("withdrawn", round=job.header.round, order=job.task.hex())
            # Only then: otherwise the trainer works for another job.
            if job.training:
                self._trainer.kill()
