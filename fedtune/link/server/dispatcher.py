"""Tasks, replies and receipts of a run, between the round loop and the gRPC service.

Two threads call. The round loop posts tasks, collects results and says what became of them; the service offers the
tasks to the clients and passes on their replies. One lock guards everything, and nothing here waits for a network.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from fedtune.link import uploads
from fedtune.link.audit_log import RecordEvent, ignore_event
from fedtune.link.envelopes import HELLO, RESULT, TRAIN, assignment_subject, digest, make_part
from fedtune.link.rejections import TRANSIENT, rejection
from fedtune.link.server.assignments import (
    Assignments,
    Body,
    Result,
    Task,
    is_hello,
    is_training,
)
from fedtune.link.server.blocklist import Blocklist, RefusalCounter
from fedtune.link.server.membership import Membership
from fedtune.link.server.presence import ClientPresence, Presence
from fedtune.link.server.receipts import Receipts
from fedtune.link.server.replies import Replies
from fedtune.link.server.reports import Reports
from fedtune.link.server.run_info import RunInfo
from fedtune.link.server.wakeup import Wakeup
from fedtune.link.settings import GIB, KIB, MIB, LinkSettings
from fedtune.store.files import make_folder, store_errors
from fedtune.wire.v1 import link_pb2 as pb

MAX_NAMES = 400
"""Of a cohort, in a header of 64 KiB: more organisations than any policy asks for."""
RESULT_S = 24 * 3600.0
"""Within which a client should have fetched the result; nothing waits for it so long."""
STALE_PART_S = 24 * 3600.0
"""After which a part that a client stopped sending is removed from the disk at the next start."""


def named_members(cohort: Collection[str], client: str) -> Sequence[str]:
    """Return the names of a cohort for one of it, in order: all, or as many as a header has room for."""
    others = sorted(set(cohort) - {client})[: MAX_NAMES - 1]
    return sorted([*others, client])


class Dispatcher:
    """Posts the round loop's tasks to clients, and hands back their replies; see the module."""

    def __init__(
        self,
        run: RunInfo,
        settings: LinkSettings,
        folder: Path,
        blocklist: Blocklist,
        *,
        accepted: Mapping[tuple[int, str], str] | None = None,
        ended: int = 0,
        unsettled: Mapping[str, int] | None = None,
        informed: Collection[str] = (),
        record: RecordEvent = ignore_event,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin a run, or go on with one.

        Args:
            run: what its statements have in common.
            settings: timeouts and quotas.
            folder: for parts of replies; created if missing.
            blocklist: clients whose calls are refused.
            accepted: SHA-256 (hex) of the updates that the run's journal holds, by round and client.
            ended: number of the last round that is over.
            unsettled: by client, the round of an order that outlasts rounds.
            informed: clients that know from an earlier process that the run is complete.
            record: receives the events.
            clock: seconds from any start.

        Raises:
            StoreError: if the folder cannot be created.
        """
        self.run, self.settings, self.folder, self.blocklist = run, settings, folder, blocklist
        self.epoch = secrets.randbits(63)
        """Random number of this process, by which clients notice a restart."""
        self.base = b""
        """Digest of the run's base; empty until the clients have said which they have."""
        self.max_reply_bytes: Callable[[bytes], int] = lambda front: settings.hello_mib * MIB
        """From the header of an assignment to the bytes that an honest reply has at most."""
        self.stopping: pb.Stop | None = None
        self._record, self._clock = record, clock
        # Re-entrant: `settle`, which holds it, counts a refusal, which takes it again.
        self._lock, self._wakeup = threading.RLock(), Wakeup()
        self._tasks = Assignments(folder, inline_bytes=settings.inline_kib * KIB)
        self._receipts = Receipts(accepted or {}, ended, unsettled or {})
        self._presence = Presence(settings, clock, on_arrival=self._wakeup.set)
        self._members = Membership(self._presence, record, informed=informed)
        self._reports = Reports(self._presence, record, clock, lost_s=settings.lost_s)
        self._replies = Replies(
            run, settings, folder, self._tasks, self._receipts, self._presence, self._wakeup.set, record
        )
        self._refusals = RefusalCounter()
        self._cohort: Collection[str] = ()
        self._result: Mapping[str, Body] = {}  # files that every client gets at the end of the run, by name
        self._result_round = 0  # the last one of the run
        self._result_parts: Sequence[pb.Part] = ()
        self._given = set[str]()  # clients whose order "result" was posted
        self._rounds = 0  # that this process has begun
        self._given_work = set[str]()  # clients that this process has given a task of a round
        self._knows_open_tasks = False  # since a round has ended in this process
        with store_errors(folder):
            make_folder(folder)
            uploads.remove_stale_parts(folder, older_s=STALE_PART_S)

    # ---- the round loop's side ----

    def set_journal_end(self, journal_end: Callable[[], tuple[int, str]]) -> None:
        """Have receipts name the end of the run's journal: its number of records, and the digest (hex) of the last."""
        with self._lock:
            self._receipts.journal_end = journal_end

    def set_enrolled(self, enrolled: Callable[[], Collection[str]]) -> None:
        """Have the end of the run wait for clients that are enrolled and not here, as long as the server drains."""
        with self._lock:
            self._members.enrolled = enrolled

    def set_exclusion(self, exclusion: Callable[[str], str]) -> None:
        """Have no round ask, or wait for, a client that may not call: one that is revoked, for example.

        Args:
            exclusion: returns why a client may not; empty if it may.
        """
        with self._lock:
            self._members.exclusion = exclusion

    def may_call(self, client: str) -> bool:
        """Return whether no revocation, date or bar keeps a client out."""
        with self._lock:
            return not self._members.exclusion(client)

    def fleet(self) -> Mapping[str, int]:
        """Return the clients with a sign of life within `lease_s`, and how often each came again after a refusal."""
        with self._lock:
            self._members.record_changes()
            return {client: self._members.readmissions(client) for client in self._members.here()}

    def refuse(self, client: str, refusal: pb.Refusal) -> None:
        """Tell a client that it takes no part in the run, and why; until it says hello again it is not asked."""
        with self._lock:
            self._members.refuse(client, refusal)

    def post(self, client: str, task: str, front: bytes, bodies: Mapping[str, bytes], *, seconds: float) -> str:
        """Give a client a task, and return the message id under which its result is collected.

        A task that is open already is not posted twice: the message id waits for the same reply.

        Args:
            client: its name.
            task: HELLO or TRAIN.
            front: header of the message.
            bodies: by key.
            seconds: after which the round loop will not wait any longer.

        Raises:
            WireError: if the message of a round is no assignment.
        """
        contents = {"": front, **bodies}
        new = self._make_task(client, task, contents, seconds)
        with self._lock:
            self._close_earlier_tasks(new)
            if not is_hello(new):
                self._given_work.add(client)
            # Asked again: what the earlier reply led to does not count any more.
            if self._tasks.get(client, new.digest) is None:
                self._receipts.forget(client, new.digest)
            posted = self._tasks.add(new, contents)
            # The earlier reply was noted, but the round needs more.
            if posted.has_receipt:
                posted.reply = None
                self._receipts.forget(client, posted.digest)
            posted.deadline = new.deadline
            message_id = self._tasks.new_message_id(posted)
            if posted.is_answered:
                self._replies.deliver(posted)
            self._presence.wake(client)
        self._record(
            "asked",
            client=client,
            task=task,
            round=new.header.round,
            order=new.digest.hex(),
            bytes=sum(part.num_bytes for part in new.header.parts),
        )
        return message_id

    def _make_task(self, client: str, task: str, contents: Mapping[str, bytes], seconds: float) -> Task:
        parts = [make_part(key, contents[key]) for key in sorted(contents)]
        header = pb.Header(kind=pb.ORDER, to=client, task=task, parts=parts)
        if task == HELLO:
            # A nonce makes each hello a task of its own: the profile is asked anew. Tasks of a round have none, so
            # that a restarted server posts the same bytes, and a client that has replied already need not work again.
            header.nonce, max_bytes = secrets.randbits(64), self.settings.hello_mib * MIB
        else:
            number, base, state = assignment_subject(contents[""], parts)
            header.round, header.base, header.state = number, bytes.fromhex(base) or self.base, state
            # Signed with the task: a site's policy may refuse rounds of too few clients.
            header.cohort, max_bytes = len(self._cohort), self.max_reply_bytes(contents[""])
            if task == TRAIN:
                # Of an asynchronous round no other client is promised.
                header.cohort = max(1, header.cohort)
            with self._lock:
                if task == TRAIN and self._members.reads_names(client):
                    header.members.extend(named_members(self._cohort, client))
        envelope, now = self.run.seal(header), self._clock()
        return Task(client, digest(envelope), envelope, header, max_bytes, now + seconds, now)

    def _close_earlier_tasks(self, new: Task) -> None:
        """Close what a new task takes the place of."""
        for earlier in self._tasks.of_client(new.client):
            if is_hello(new):  # of several hellos only the last one is waited for
                if is_hello(earlier):
                    self._replies.close(earlier)
            elif is_training(earlier) and earlier.digest != new.digest and earlier.header.round == new.header.round:
                self._replies.give_receipt(earlier, pb.NOTED)  # its client asked for more than the first task brought

    def collect(self, message_ids: Collection[str]) -> Mapping[str, Result]:
        """Return the results that are ready, each once; tasks of clients that are lost or excluded are withdrawn."""
        with self._lock:
            self._members.record_changes()
            for message_id in message_ids:
                task = self._tasks.waiting_task(message_id)
                if task is None:
                    continue
                if reason := self._members.exclusion(task.client) or self._reports.lost_reason(task):
                    self._tasks.withdraw(message_id, task, reason)
                    self._record("lost", client=task.client, round=task.header.round, reason=reason)
            return self._tasks.collect(message_ids)

    def wait(self, seconds: float) -> None:
        """Wait until a result is ready or a client arrives, at most so long."""
        self._wakeup.wait(seconds)

    def begin_round(self, cohort: Collection[str]) -> None:
        """Note the clients of the round that begins.

        Of a round that was open before a restart one may have been revoked since: the others would decline an order
        that names it.
        """
        with self._lock:
            self._cohort = tuple(client for client in cohort if not self._members.exclusion(client))
            self._rounds += 1

    def settle(self, client: str, number: int, refusal: pb.Refusal | None) -> None:
        """Give the receipt of a client's reply in a round: it is durable and used, or refused."""
        with self._lock:
            for task in self._tasks.of_client(client):
                if task.header.round == number and task.is_answered and not task.has_receipt:
                    self._replies.give_receipt(task, pb.REFUSED if refusal else pb.ACCEPTED, refusal)
                    if refusal:
                        self.count_refusal(client, refusal)

    def end_round(self, number: int, *, working: Collection[str] = ()) -> None:
        """Note that a round is over: clients that still work for it may stop, but for those whose orders outlast it."""
        with self._lock:
            self._receipts.end_round(number, working)
            self._knows_open_tasks = True
            for task in self._tasks.all():
                if is_training(task) and task.client in working:
                    continue
                if 0 < task.header.round <= number:
                    # The receipt first: closing the task forgets the reply that it is for.
                    self._replies.give_receipt(task, pb.LATE)
                    self._tasks.end_waiting(task, "its round has ended")
                    self._replies.close(task)

    def finish(self, number: int, files: Mapping[str, Body]) -> None:
        """Note that the run is complete: every client that asks gets the files of its result, and then hears the end.

        Args:
            number: of the last round.
            files: by name below the folder of the result.
        """
        with self._lock:
            self._result, self._result_round = files, number
            self._result_parts = [make_part(name, files[name]) for name in sorted(files)]
            self.stop(pb.Stop.FINISHED)

    def _post_result(self, client: str) -> None:
        """Give a client the files of the run's result, once."""
        if not self._result or client in self._given:
            return
        self._given.add(client)
        parts, number = self._result_parts, self._result_round
        header = pb.Header(kind=pb.ORDER, to=client, task=RESULT, round=number, base=self.base, parts=parts)
        envelope, now = self.run.seal(header), self._clock()
        task = Task(client, digest(envelope), envelope, header, 0, now + RESULT_S, now)
        self._tasks.add(task, self._result)
        self._record("giving", client=client, order=task.digest.hex(), bytes=sum(part.num_bytes for part in parts))

    def stop(self, why: pb.Stop.Why, *, retry_after_s: float = 0.0) -> None:
        """Answer every client that asks for work that there is none left."""
        with self._lock:
            self.stopping = pb.Stop(why=why, retry_after_ms=int(1000 * retry_after_s))
            self._presence.wake_all()

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return self.stopping is not None and self.stopping.why == pb.Stop.FINISHED

    def uninformed_clients(self) -> Sequence[str]:
        """Return the clients that do not know yet that there is no more work, and may still ask."""
        with self._lock:
            return self._members.list_uninformed(finished=self.finished)

    def status(self) -> Mapping[str, ClientPresence]:
        """Return the presence of every client that has ever come."""
        with self._lock:
            return self._presence.status(lambda client: len(self._tasks.of_client(client)), self._reports.describe)

    # ---- the service's side ----

    def greet(self, client: str) -> None:
        """Note that a client has said hello: a refusal of its process before this one counts no more."""
        with self._lock:
            self._members.readmit(client)
            self._presence.sign_of_life(client)

    def claim(self, client: str, process: int) -> bool:
        """Return whether a process may act under a client's name; see `Membership.claim`."""
        with self._lock:
            return self._members.claim(client, process)

    def sign_of_life(self, client: str) -> None:
        with self._lock:
            self._presence.sign_of_life(client)

    def hear(self, client: str, process: int, progress: Sequence[pb.Progress], dropped: Sequence[pb.Dropped]) -> None:
        """Take what a client says of its tasks: how far it is, and which it does not believe."""
        with self._lock:
            open_tasks = {task.digest for task in self._tasks.of_client(client)}
            self._reports.hear(client, process, open_tasks, progress, dropped)

    def excuse(self, client: str) -> None:
        """Note that a client waits for the server alone: it is not lost for that."""
        with self._lock:
            self._presence.sign_of_life(client)
            self._reports.progress.note(client)

    def note_bytes(self, client: str, part_digest: bytes, num_bytes: int) -> None:
        """Note how many bytes of a part have come from a client."""
        with self._lock:
            self._presence.sign_of_life(client)
            self._reports.progress.note_bytes(client, part_digest, num_bytes)

    def note_fetched(self, client: str, part_digest: bytes, begin: int, end: int) -> None:
        """Note that a client has fetched a part's bytes from one place to another."""
        with self._lock:
            self._presence.sign_of_life(client)
            gained = self._reports.progress.note_bytes(client, part_digest, end)
            self._presence.count_fetched_again(client, end - begin - min(gained, end - begin))

    def hold(self, client: str, change: int) -> None:
        """Note that one more call of a client is held (1), or one fewer (-1)."""
        with self._lock:
            self._presence.hold(client, change)

    def listen(self, client: str, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener` whenever something changes for a client, until the returned function is called."""
        with self._lock:
            self._presence.add_listener(client, listener)

        def leave() -> None:
            with self._lock:
                self._presence.remove_listener(client, listener)

        return leave

    def offer(self, client: str, holding: Collection[bytes]) -> pb.NextReply | None:
        """Return the next thing a client must know: a task to drop, a new task, or the end; None if there is nothing.

        Args:
            client: its name.
            holding: digests of the tasks that it works on already.
        """
        with self._lock:
            if (refusal := self._members.refusal(client)) is not None:
                return pb.NextReply(refusal=refusal)
            self._post_result(client)
            # First what may stop: a client that trains for a closed task wastes its machine. A process that has only
            # begun posts what was open before it once more, and what its clients do until then counts.
            knows = self._knows_open_tasks or client in self._given_work
            for task_digest in holding:
                if knows and self._tasks.get(client, task_digest) is None:
                    return pb.NextReply(withdrawn=pb.Withdrawn(order=task_digest))
            for task in self._tasks.of_client(client):
                if task.digest not in holding and not task.is_answered:
                    # A duration, since the clocks of two machines differ.
                    left_s = max(0.0, task.deadline - self._clock())
                    return pb.NextReply(work=self._tasks.work(task, left_s=left_s))
            # After the end of the run none but its result is open: the client must not leave before it has that.
            if self.stopping is None or any(task.header.task == RESULT for task in self._tasks.of_client(client)):
                return None
            self._members.inform(client, finished=self.finished)
            return pb.NextReply(stop=self._stop_for(client))

    def _stop_for(self, client: str) -> pb.Stop:
        """Return what a client hears at the end of the run, or of this process; the end of the run is signed."""
        assert self.stopping is not None
        stop = pb.Stop(why=self.stopping.why, retry_after_ms=self.stopping.retry_after_ms)
        if self.finished:
            number, parts = self._result_round, self._result_parts
            stop.end.CopyFrom(self.run.end(client, epoch=self.epoch, number=number, parts=parts))
        return stop

    def body(self, client: str, part_digest: bytes) -> Body:
        """Return a part of an open task of a client.

        Raises:
            RejectionError: if there is no such part, or the client has fetched too much again today.
        """
        with self._lock:
            # Only what it fetches again: how much an honest client needs in a day is for the recipe to say.
            limit, again = int(self.settings.day_gib * GIB), self._presence.fetched_again(client)
            if again > limit:
                raise rejection(pb.QUOTA, "digest", f"at most {limit} bytes a day that were fetched before", again)
            return self._tasks.body(client, part_digest)

    def submit(
        self, client: str, reply: bytes, header: pb.Header, inline: Mapping[bytes, bytes]
    ) -> pb.SubmitReply | None:
        """Take a reply to a task, and return the response; None as long as its receipt is pending.

        Args:
            client: name in the caller's certificate.
            reply: digest of the reply's header.
            header: verified, and of the same author.
            inline: bytes of parts by digest; verified here.

        Raises:
            RejectionError: if it is no reply to an open task, or not one that its task allows.
        """
        with self._lock:
            return self._replies.submit(client, reply, header, inline)

    def missing_part(self, client: str, reply: bytes, part_digest: bytes) -> pb.Part:
        """Return the part of a reply whose bytes are not here yet.

        Raises:
            RejectionError: if no such bytes are expected.
        """
        with self._lock:
            return self._tasks.missing_part(client, reply, part_digest)

    def count_bytes(self, client: str, num_bytes: int) -> None:
        """Count bytes that a client has sent."""
        with self._lock:
            self._presence.count_bytes(client, num_bytes)

    def count_refusal(self, client: str, refusal: pb.Refusal) -> None:
        """Count a final refusal; after `bar_after` of them in ten rounds the client is blocked."""
        # An honest client comes with an unknown task, too: after a restart of the server, or when it is far too late.
        # Nor is it to blame for what only the sum with the updates of others shows, or their median.
        if refusal.reason in TRANSIENT or refusal.reason in (pb.ORDER_UNKNOWN, pb.NOT_AGGREGATED, pb.NORM_OVER_CAP):
            return
        with self._lock:
            reason = self._refusals.count(client, refusal, self._rounds, limit=self.settings.bar_after)
            if reason:
                self.blocklist.block(client, reason)
                self._record("barred", client=client, reason=reason)
                self._presence.wake(client)

    def add_pushed_part(self, client: str, reply: bytes, part_digest: bytes) -> None:
        """Note that a part lies whole in the folder."""
        with self._lock:
            for task in self._tasks.of_client(client):
                if task.reply is not None and task.reply.digest == reply:
                    path = uploads.part_path(self.folder, client, part_digest)
                    # Mapped, not read: the updates of a whole cohort need not fit into the memory.
                    task.reply.bodies[part_digest] = uploads.map_file(path)
