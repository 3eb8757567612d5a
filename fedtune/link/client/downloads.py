"""Parts of a task on their way to a client: verified by digest, and continued where a broken connection left them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

import grpc

from fedtune.errors import WireError
from fedtune.link.audit_log import RecordEvent
from fedtune.link.client.backoff import Backoff
from fedtune.link.client.bandwidth import Bandwidth
from fedtune.link.client.channel import LinkStub
from fedtune.link.client.jobs import Job, StoppedError
from fedtune.link.client.outbox import Entry
from fedtune.link.rejections import FATAL, describe
from fedtune.link.uploads import BLOCK
from fedtune.store.files import open_private, store_errors, write_private
from fedtune.wire.v1 import link_pb2 as pb

ATTEMPTS = 2
"""Of a whole download: the first may go on behind bytes that a crash has damaged on this disk, the second does not."""
RETRY_S = 0.2


class Downloads:
    """Fetches parts of tasks into the outbox."""

    def __init__(self, calls: LinkStub, backoff: Backoff, bandwidth: Bandwidth, *, record: RecordEvent) -> None:
        self._calls, self._backoff, self._bandwidth, self._record = calls, backoff, bandwidth, record

    def fetch(self, job: Job, entry: Entry, part: pb.Part, inline: Mapping[bytes, bytes]) -> None:
        """Have a part of a task on the disk.

        Args:
            job: that needs it.
            entry: of the outbox, where it is stored.
            part: key, digest and size, as the coordinator has signed them.
            inline: bytes that came with the task, by digest.

        Raises:
            WireError: if twice other bytes come than were signed.
            StoppedError: if the job should give up.
        """
        whole = entry.part(part.digest)
        # Renamed into place only after its digest was verified, so it need not be read again.
        if whole.exists():
            return
        partial = whole.with_name(f"{whole.name}.part")
        # Inline bytes are not signed themselves; wrong ones are ignored, and the part is fetched.
        if (data := inline.get(part.digest)) is not None and sha256(data).digest() == part.digest:
            with store_errors(whole):
                # Renamed into place like a download: a crash within the write must leave no torn part under this name.
                write_private(partial, data)
                partial.replace(whole)
            return
        job.begin(pb.Progress.FETCHING, part.num_bytes)
        for attempt in range(ATTEMPTS):
            with self._bandwidth.turn(job):
                downloaded = self._download(job, part, partial)
            if downloaded == part.digest:
                with store_errors(whole):
                    partial.replace(whole)
                self._record("fetched", round=job.header.round, part=part.digest.hex(), bytes=part.num_bytes)
                return
            with store_errors(partial):
                partial.unlink()
            self._record("spoilt", round=job.header.round, part=part.digest.hex(), attempt=attempt + 1)
        raise WireError(f"expected a part of digest {part.digest.hex()[:16]}; got other bytes twice")

    def _download(self, job: Job, part: pb.Part, partial: Path) -> bytes:
        """Fetch a part from where its file ends, and return the digest of the whole file."""
        with store_errors(partial), open(partial, "ab", opener=open_private):
            pass  # it is there from now on
        hasher = hash_file(partial)
        while True:
            with store_errors(partial), open(partial, "ab", opener=open_private) as file:
                if file.tell() >= part.num_bytes:
                    return hasher.digest()
                try:
                    # No deadline: a part may take hours on a slow line. Keepalive notices a server that has gone.
                    for chunk in self._calls.fetch(pb.FetchRequest(digest=part.digest, offset=file.tell())):
                        job.check()
                        if chunk.HasField("refusal"):
                            self._check_refusal(job, chunk.refusal)
                            break
                        # Checked before the write: a server must not fill this disk beyond what was signed.
                        if file.tell() + len(chunk.data) > part.num_bytes:
                            raise WireError(f"expected a part of {part.num_bytes} bytes, as signed; got more")
                        file.write(chunk.data)
                        hasher.update(chunk.data)
                        job.done_bytes = file.tell()
                        # Not read on before its time: gRPC's window then has the server wait, too.
                        if pause_s := self._bandwidth.take(chunk.ByteSize()):
                            job.wait(pause_s)
                except grpc.RpcError as error:
                    # The next try asks from the file's end.
                    file.flush()
                    self._backoff.wait_after_error(error, job)
                    continue
                if file.tell() >= part.num_bytes:
                    return hasher.digest()
            job.wait(RETRY_S)

    def _check_refusal(self, job: Job, refusal: pb.Refusal) -> None:
        """Return if the same request may succeed later.

        Raises:
            ConfigError: if the server does not take this client.
            StoppedError: if the task is not open, or not open again yet after a restart: it is then offered once more.
        """
        if refusal.reason in FATAL:
            self._backoff.wait_after_refusal(refusal)
        if not refusal.passing:
            job.stop.wait(RETRY_S)
            raise StoppedError(describe(refusal))


def hash_file(path: Path) -> hashlib._Hash:
    """Return the SHA-256 state after all bytes of a file."""
    hasher = hashlib.sha256()
    with store_errors(path), path.open("rb") as file:
        while block := file.read(BLOCK):
            hasher.update(block)
    return hasher
