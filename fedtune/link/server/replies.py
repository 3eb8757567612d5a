"""What clients reply to their tasks: compared with the task, taken in part by part, and answered with a receipt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

from fedtune.link import uploads
from fedtune.link.audit_log import RecordEvent
from fedtune.link.envelopes import expect_fields
from fedtune.link.rejections import RejectionError, describe, one_line, rejection, veto_name
from fedtune.link.server.assignments import (
    Assignments,
    ReceivedParts,
    Task,
    TaskReply,
    Withdrawn,
    check_parts,
    is_training,
    total_bytes,
)
from fedtune.link.server.presence import Presence
from fedtune.link.server.receipts import Receipts
from fedtune.link.server.run_info import RunInfo
from fedtune.link.settings import GIB, MIB, LinkSettings
from fedtune.wire.v1 import link_pb2 as pb

RETRY_MS = 500
"""After which a client submits again a reply to a task that this process has not posted yet."""
MAX_NOTE_CHARS = 500


class Replies:
    """Moves a task from posted to receipted; not thread-safe, the dispatcher calls it with its lock held."""

    def __init__(
        self,
        run: RunInfo,
        settings: LinkSettings,
        folder: Path,
        tasks: Assignments,
        receipts: Receipts,
        presence: Presence,
        wake_round_loop: Callable[[], None],
        record: RecordEvent,
    ) -> None:
        self._run, self._settings, self._folder = run, settings, folder
        self._tasks, self._receipts, self._presence = tasks, receipts, presence
        self._wake_round_loop, self._record = wake_round_loop, record

    def submit(
        self, client: str, reply: bytes, header: pb.Header, inline: Mapping[bytes, bytes]
    ) -> pb.SubmitReply | None:
        """Take a reply to a task; see `Dispatcher.submit`."""
        expect_fields(header, federation=self._run.federation, run=self._run.run)
        if header.kind not in (pb.ANSWER, pb.DECLINE):
            raise rejection(pb.KIND_NOT_EXPECTED, "kind", "ANSWER or DECLINE", header.kind)
        if (earlier := self._receipts.find_receipt(client, header.order)) is not None:
            first, receipt = earlier
            # A receipt is final: a client must not swap its update after the round has gone on with the first one.
            if first != reply:
                raise conflict(first, reply)
            return pb.SubmitReply(receipt=receipt)
        task = self._tasks.get(client, header.order)
        if task is None:
            return self._respond_without_task(client, reply, header)
        # Repeated by the client and signed: an update made for another state or base must not enter this round.
        expect_fields(
            header,
            round=task.header.round,
            recipe=self._run.recipe_digest,
            base=task.header.base,
            state=task.header.state,
        )
        if self._settings.build:
            expect_fields(header, build=self._settings.build)
        if header.kind == pb.DECLINE:
            return self._decline(task, reply, header)
        check_parts(task, header)
        if task.reply is None or (task.reply.digest != reply and not task.reply.is_whole):
            self._check_quota(client, header)
            # Another reply takes the place of one that never arrived whole, whose bytes would stay on the disk.
            self._tasks.remove_files(task)
            task.reply = TaskReply(reply, header)
        elif task.reply.digest != reply:
            # The first whole reply counts: a client must not see the round go on and then choose another update.
            raise conflict(task.reply.digest, reply)
        return self._receive(task, task.reply, inline)

    def deliver(self, task: Task) -> None:
        """Have a whole reply ready for the round loop."""
        assert task.reply is not None
        bodies = {part.key: task.reply.bodies[part.digest] for part in task.reply.header.parts}
        self._tasks.set_result(task, ReceivedParts(task.client, bodies))
        self._wake_round_loop()

    def give_receipt(self, task: Task, verdict: pb.Verdict, refusal: pb.Refusal | None = None) -> None:
        """Give the receipt of a whole reply, unless it has one."""
        reply = task.reply
        if reply is None or not reply.is_whole or reply.receipt is not None:
            return
        reply.receipt = self._receipts.give(self._run, task.client, reply.digest, reply.header, verdict, refusal)
        self._receipts.remember(task.client, task.digest, reply.digest, reply.receipt)
        if verdict == pb.ACCEPTED:
            self._receipts.accept(task.client, reply.header)
        self._tasks.remove_files(task)
        # The space of a removed file is free only when its map has gone as well.
        reply.bodies.clear()
        self._record(
            "receipt",
            client=task.client,
            round=task.header.round,
            answer=reply.digest.hex(),
            verdict=pb.Verdict.Name(verdict),
            reason=describe(refusal) if refusal else "",
        )
        self._presence.wake(task.client)

    def close(self, task: Task) -> None:
        """Forget a task, and let its client know."""
        self._tasks.close(task)
        self._presence.wake(task.client)

    def _respond_without_task(self, client: str, reply: bytes, header: pb.Header) -> pb.SubmitReply:
        """Return the response to a reply whose task is not open: accepted before, too late, or not posted yet."""
        if self._receipts.is_accepted(client, header):
            receipt = self._receipts.give(self._run, client, reply, header, pb.ACCEPTED)
            return pb.SubmitReply(receipt=receipt)
        is_posted = any(task.header.round == header.round for task in self._tasks.of_client(client))
        # After a restart a client may be back before the round loop has posted its task again.
        if self._receipts.may_be_posted(client, header.round) and not is_posted:
            return pb.SubmitReply(busy=pb.Wait(retry_after_ms=RETRY_MS))
        if 0 < header.round <= self._receipts.ended:
            self._record("late", client=client, round=header.round)
            return pb.SubmitReply(receipt=self._receipts.give(self._run, client, reply, header, pb.LATE))
        raise rejection(pb.ORDER_UNKNOWN, "order", "a task of this client", header.order.hex()[:16])

    def _decline(self, task: Task, reply: bytes, header: pb.Header) -> pb.SubmitReply:
        """Withdraw a task that its client will not do."""
        if task.is_answered:
            raise rejection(pb.CONFLICT, "answer", "the reply that came first", "a decline")
        # Both come from outside: a veto of a later release has no name here, and the note could hold escape codes.
        veto = veto_name(header.decline.veto)
        note = one_line(header.decline.note, longest=MAX_NOTE_CHARS)
        reason = note if header.decline.veto == pb.WORK_FAILED else f"declined, {veto}: {note}"
        self._tasks.set_result(task, Withdrawn(task.client, reason))
        self._wake_round_loop()
        about = task.header
        self._record("declined", client=task.client, round=about.round, task=about.task, veto=veto, reason=note)
        receipt = self._receipts.give(self._run, task.client, reply, header, pb.NOTED)
        self._receipts.remember(task.client, task.digest, reply, receipt)
        self.close(task)
        return pb.SubmitReply(receipt=receipt)

    def _check_quota(self, client: str, header: pb.Header) -> None:
        """Check quota and disk before a byte of a reply is taken.

        Raises:
            RejectionError: if the client has sent too much today, or the disk is nearly full; both may pass.
        """
        total = total_bytes(header)
        limit, day_total = int(self._settings.day_gib * GIB), self._presence.day_bytes(client) + total
        if day_total > limit:
            raise rejection(pb.QUOTA, "parts", f"at most {limit} bytes a day", day_total)
        free, required = uploads.free_bytes(self._folder), total + self._settings.free_mib * MIB
        # A full disk would stop the journal, and with it the run.
        if free < required:
            raise rejection(pb.DISK_LOW, "disk", f"{required} bytes free", free)

    def _receive(self, task: Task, reply: TaskReply, inline: Mapping[bytes, bytes]) -> pb.SubmitReply | None:
        """Take the parts that came inline; return what is missing, the receipt, or None while that is pending."""
        wanted = list[pb.Want]()
        for part in reply.header.parts:
            if part.digest in reply.bodies:
                continue
            if (data := inline.get(part.digest)) is not None:
                # Inline bytes are not signed themselves: the signature covers their digests.
                if len(data) != part.num_bytes or sha256(data).digest() != part.digest:
                    raise rejection(pb.DIGEST, part.key, part.digest.hex()[:16], sha256(data).hexdigest()[:16])
                reply.bodies[part.digest] = data
                self._presence.count_bytes(task.client, len(data))
                continue
            path = uploads.part_path(self._folder, task.client, part.digest)
            # From where the file ends: after a cut only the rest is sent.
            wanted.append(pb.Want(digest=part.digest, offset=uploads.stored_bytes(path)))
        if wanted:
            return pb.SubmitReply(wanted=pb.Wanted(parts=wanted))
        if not reply.is_whole:
            reply.is_whole = True
            self.deliver(task)
            self._record(
                "answered",
                client=task.client,
                task=task.header.task,
                round=task.header.round,
                answer=reply.digest.hex(),
                bytes=total_bytes(reply.header),
            )
            # No round decides about a profile or scores, so their receipt need not wait.
            if not is_training(task):
                self.give_receipt(task, pb.NOTED)
                self.close(task)
        return pb.SubmitReply(receipt=reply.receipt) if reply.receipt is not None else None


def conflict(first: bytes, reply: bytes) -> RejectionError:
    return rejection(pb.CONFLICT, "answer", f"{first.hex()[:16]}, which came first", reply.hex()[:16])
