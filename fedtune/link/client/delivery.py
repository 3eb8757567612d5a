"""Replies on their way to the server: submitted, pushed and submitted again until there is a signed receipt."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import grpc

from fedtune.errors import WireError
from fedtune.link.audit_log import RecordEvent
from fedtune.link.client.backoff import REPORT_INTERVAL_S, Backoff
from fedtune.link.client.bandwidth import Bandwidth
from fedtune.link.client.channel import LinkStub
from fedtune.link.client.jobs import Job
from fedtune.link.client.replies import reply_bytes
from fedtune.link.client.session import Session
from fedtune.link.envelopes import digest, expect_fields, verify_envelope
from fedtune.link.rejections import FATAL, describe, reason_name
from fedtune.wire.v1 import link_pb2 as pb

SUBMIT_S = 60.0
"""Deadline of a Submit, which the server holds for up to 20 s until there is a receipt."""
LEAST_BYTES_S = 256
"""A line with fewer bytes a second is none; a Submit has time for its inline parts on any other."""
MAX_BUSY_S = 60.0
"""Longest pause that a server may ask for."""
PUSH_RETRY_S = 0.2
REFUSED_RETRY_S = 1.0


class Delivery:
    """Brings replies to the server."""

    def __init__(
        self,
        session: Session,
        calls: LinkStub,
        backoff: Backoff,
        bandwidth: Bandwidth,
        *,
        record: RecordEvent,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._session, self._calls, self._backoff, self._record, self._clock = session, calls, backoff, record, clock
        self._bandwidth = bandwidth
        self._put_off: dict[str, float] = {}  # by reason: when it was recorded last

    def deliver(
        self,
        job: Job,
        request: pb.SubmitRequest,
        paths: Mapping[bytes, Path],
        *,
        durable: threading.Thread | None = None,
    ) -> pb.Envelope | None:
        """Submit and push a reply until there is a receipt, which is returned; None after a final refusal.

        Args:
            job: whose reply it is.
            request: the signed reply.
            paths: files of the parts that may have to be pushed, by digest.
            durable: makes the reply durable, beside the push; waited for before the reply is submitted as whole.

        Raises:
            WireError: if the server asks for other parts, or its receipt does not hold.
            StoppedError: if the job should give up.
            ConfigError: if the server does not take this client.
        """
        reply = digest(request.envelope)
        self._record("sending", round=job.header.round, answer=reply.hex(), bytes=reply_bytes(request))
        job.begin(pb.Progress.SENDING, reply_bytes(request))
        timeout_s = SUBMIT_S + request.ByteSize() / LEAST_BYTES_S
        while True:
            if pause_s := self._bandwidth.take(request.ByteSize()):
                job.wait(pause_s)
            response = self._backoff.retry(job, lambda: self._calls.submit(request, timeout=timeout_s))
            self._session.hear_version(response.roster_version)
            match response.WhichOneof("what"):
                case "receipt":
                    return self._verify_receipt(job, reply, response.receipt)
                case "wanted":
                    for want in response.wanted.parts:
                        if want.digest not in paths:
                            raise WireError("expected the server to want a part of the reply; it wants another")
                        self._push(job, reply, want, paths[want.digest])
                    if durable is not None:
                        # The next Submit promises these bytes: after a crash they must be here to be sent again.
                        durable.join()
                case "busy":
                    job.wait(min(MAX_BUSY_S, response.busy.retry_after_ms / 1000))
                case "refusal" if response.refusal.reason in FATAL:
                    self._backoff.wait_after_refusal(response.refusal)
                case "refusal" if response.refusal.passing:
                    self._note_put_off(job, response.refusal)
                    job.wait(REFUSED_RETRY_S)
                case _:
                    self._record(
                        "refused",
                        round=job.header.round,
                        reason=describe(response.refusal),
                        code=reason_name(response.refusal.reason),
                    )
                    # The task stays open, so the server offers it again at once, and the reply would be the same.
                    job.stop.wait(REFUSED_RETRY_S)
                    return None

    def _verify_receipt(self, job: Job, reply: bytes, receipt: pb.Envelope) -> pb.Envelope:
        """Return a receipt whose signature holds.

        Raises:
            WireError: if it is not the coordinator's, or of another reply.
        """
        header, _ = verify_envelope(receipt, self._session.find_coordinator)
        to = self._session.identity.name
        expect_fields(header, kind=pb.RECEIPT, to=to, run=job.header.run, order=job.task)
        if header.receipt.answer != reply:
            raise WireError("expected a receipt of this reply; got one of another")
        verdict = pb.Verdict.Name(header.receipt.verdict) if header.receipt.verdict in pb.Verdict.values() else "?"
        reason = describe(header.receipt.refusal) if header.receipt.HasField("refusal") else ""
        self._record(
            "receipt",
            round=job.header.round,
            answer=reply.hex(),
            verdict=verdict,
            reason=reason,
            journal=header.receipt.journal_records,
            head=header.receipt.journal_head.hex(),
        )
        return receipt

    def _note_put_off(self, job: Job, refusal: pb.Refusal) -> None:
        """Record that a reply must wait; a reason that lasts once in a while, since it comes with every try."""
        now, code = self._clock(), reason_name(refusal.reason)
        if now - self._put_off.get(code, float("-inf")) >= REPORT_INTERVAL_S:
            self._put_off[code] = now
            self._record("put off", round=job.header.round, reason=describe(refusal), code=code)

    def _push(self, job: Job, reply: bytes, want: pb.Want, path: Path) -> None:
        """Send a part from where the server's copy ends; after a failure, too, the next Submit says what is missing."""
        greeting = self._session.greeting
        # The server has gone: the main loop says hello first, and learns the limits of the next one.
        if greeting is None:
            job.wait(PUSH_RETRY_S)
            return
        with self._bandwidth.turn(job):
            self._send_part(job, want, OutgoingUpload(path, reply, want, greeting.limits, self._bandwidth), reply)

    def _send_part(self, job: Job, want: pb.Want, upload: OutgoingUpload, reply: bytes) -> None:
        try:
            for ack in self._calls.push(upload.messages()):
                job.check()
                if ack.HasField("refusal"):
                    self._note_put_off(job, ack.refusal)
                    if ack.refusal.reason in FATAL:
                        self._backoff.wait_after_refusal(ack.refusal)
                    job.wait(PUSH_RETRY_S)
                    return
                upload.acknowledge(ack.taken)
                job.done_bytes = ack.taken
                if ack.complete:
                    num_bytes = upload.sent - want.offset
                    self._record("pushed", round=job.header.round, answer=reply.hex(), bytes=num_bytes)
                    return
        except grpc.RpcError as error:
            self._record("cut", round=job.header.round, answer=reply.hex(), bytes=upload.sent - want.offset)
            self._backoff.wait_after_error(error, job)
        finally:
            upload.end()


class OutgoingUpload:
    """A part on its way to the server: at most a window of it is not acknowledged yet.

    gRPC reads the messages in a thread of its own, while the acknowledgements come in the thread of the job.
    """

    def __init__(self, path: Path, reply: bytes, want: pb.Want, limits: pb.Limits, bandwidth: Bandwidth) -> None:
        self._path, self._reply, self._want, self._limits, self._bandwidth = path, reply, want, limits, bandwidth
        self.sent = self._acknowledged = want.offset
        self._changed, self._over = threading.Condition(), False

    def messages(self) -> Iterator[pb.PushPart]:
        """Yield the messages; waits for acknowledgements when the window is full."""
        with self._path.open("rb") as file:
            file.seek(self._want.offset)
            message = pb.PushPart(answer=self._reply, digest=self._want.digest, offset=self._want.offset)
            more, size = True, self._bandwidth.piece(self._limits.part_bytes)
            while not self._over and more:
                message.data = file.read(size)
                self.sent += len(message.data)
                more = len(message.data) == size
                self._wait(self._bandwidth.take(len(message.data)))
                # The first message goes out even without data: a server that has the whole part from before a restart
                # verifies it only then.
                yield message
                message = pb.PushPart()
                with self._changed:
                    # HTTP/2's own window follows the sender: without this one, a server's memory would grow with it.
                    while not self._over and self.sent - self._acknowledged > self._limits.window_bytes:
                        self._changed.wait(1.0)

    def _wait(self, seconds: float) -> None:
        """Wait, unless the upload ends before."""
        if seconds:
            with self._changed:
                self._changed.wait_for(lambda: self._over, seconds)

    def acknowledge(self, received: int) -> None:
        """Note how many bytes of the part the server has."""
        with self._changed:
            self._acknowledged = received
            self._changed.notify_all()

    def end(self) -> None:
        """End the messages: without it gRPC's thread would wait for acknowledgements that never come."""
        with self._changed:
            self._over = True
            self._changed.notify_all()
