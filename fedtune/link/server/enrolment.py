"""The desk at which requests for certificates are taken, kept in a queue for the CA, and answered when it is back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

from fedtune.errors import FedtuneError, StoreError, WireError
from fedtune.link.audit_log import RecordEvent
from fedtune.link.pki import authority, certificates, enrollment, invitations, queue_files, registrar
from fedtune.link.pki.dsse import MAX_BYTES
from fedtune.link.pki.identity import CERTIFICATE, Identity, format_time
from fedtune.link.pki.roster import Party, RosterFile
from fedtune.link.pki.signing import fingerprint
from fedtune.link.rejections import RejectionError, one_line, reason_name, rejection
from fedtune.store.files import make_private, store_errors
from fedtune.wire.v1 import link_pb2 as pb

QUEUE = "queue"
POLL_MS, RENEWAL_POLL_MS = 10_000, 600_000
"""After which a site asks again whether its request has been signed."""
MAX_FORGOTTEN = 4096
LEAST_GAIN_S = 6 * 3600
"""By which a registrar's certificate must outlast the one before: each makes a roster that all parties fetch."""


class Desk:
    """Takes requests and answers them; called from several threads.

    All that it knows is in its folder, each file written in one step: a restart loses nothing.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        roster: RosterFile,
        *,
        record: RecordEvent,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Open the desk.

        Args:
            folder: of the invitations and the queue.
            identity: of the coordinator, whose roster and certificate are replaced when the queue brings new ones.
            roster: in that folder.
            record: receives the events.
            now: seconds since 1970.
        """
        self.folder, self.queue = folder, folder / QUEUE
        self._identity, self._roster, self._record, self._now = identity, roster, record, now
        self._lock = threading.Lock()
        self._seen = ""  # digest of the roster in the queue that was looked at last
        self._said = dict[str, str]()  # what was recorded last of each name: a waiting site asks every few seconds

    # ---- the calls ----

    def enrol(self, call: pb.EnrolRequest) -> pb.EnrolReply:
        """Take the request of a site that has an invitation, or answer it."""
        name = "(unknown)"
        try:
            with self._lock:
                known = invitations.find(self.folder, call.invitation)
                # One answer to both: it says nothing of which codes there are.
                if known is None or not known.is_proof(call.request, call.signature):
                    raise rejection(pb.INVITATION_UNKNOWN, "code", "the code of an open invitation", "another")
                name = known.name
                return self._take(known, call.request)
        except RejectionError as error:
            return self._refuse(name, error)
        except StoreError as error:
            self._record("disk", reason=one_line(str(error)))
            return self._refuse(name, rejection(pb.DISK_LOW, "disk", "a disk that can be written", "none"))

    def _take(self, known: invitations.Invitation, data: bytes) -> pb.EnrolReply:
        """Take the request of an invitation.

        Raises:
            RejectionError: if it may not be used so.
            StoreError: if the folder cannot be written.
        """
        request = read(data)
        asked = (request.name, request.org, request.role, request.hosts)
        if asked != (known.name, known.org, "client", ()):
            expected = f"{known.name}, client of {known.org}"
            raise rejection(pb.REQUEST_DIFFERS, "request", expected, f"{request.name}, {request.role} of {request.org}")
        holder = invitations.holder_of(request)
        if known.holder and known.holder != holder:
            raise rejection(pb.INVITATION_USED, "code", "a code that is new, or the keys that used it", "other keys")
        # Later than that its first holder still gets the answer: a person may sign after days.
        if self._now() > known.until + (invitations.KEEP_S if known.holder else 0):
            raise rejection(pb.INVITATION_ENDED, "code", "a code that is used in time", "one that has ended")
        # First: a crash after the request was stored would leave the code free for other keys.
        invitations.claim(self.folder, known, holder)
        # Signed anew, what was rejected has other bytes.
        if (reason := queue_files.rejection_of(self.queue, known.name, request.key)) is not None:
            raise rejection(pb.REQUEST_REJECTED, "request", "one that is signed", f"no: {reason}")
        return self._deliver(request, data, POLL_MS)

    def renew(self, party: Party, call: pb.RenewRequest) -> pb.EnrolReply:
        """Take a client's request for a further certificate of its keys, or answer it."""
        try:
            with self._lock:
                request = read(call.request)
                if request.name != party.name or authority.renewal_fault(party, request):
                    expected = f"{party.name}, {party.role} of {party.org}, with the key that is enrolled"
                    raise rejection(pb.REQUEST_DIFFERS, "request", expected, f"{request.name} of {request.org}")
                if (bundle := self._issue(request, call.statement)) is not None:
                    return pb.EnrolReply(bundle=bundle)
                return self._deliver(request, call.request, RENEWAL_POLL_MS)
        except RejectionError as error:
            return self._refuse(party.name, error)
        except StoreError as error:
            self._record("disk", reason=one_line(str(error)))
            return self._refuse(party.name, rejection(pb.DISK_LOW, "disk", "a disk that can be written", "none"))

    def _issue(self, request: enrollment.Request, statement: bytes) -> bytes | None:
        """Return a bundle by this server's own registrar; None if it has none, or that cannot renew for longer.

        Raises:
            RejectionError: if the client has not signed for its TLS key.
            StoreError: if the roster cannot be written.
        """
        folder, now = self._identity.folder, int(self._now())
        own = registrar.load_registrar(folder, self._roster.refresh())
        if own is None or own.delegation.not_after - now < registrar.LAST_DAYS * registrar.DAY_S:
            return None
        # A certificate of the CA may last longer than what a registrar can give: that one is for the CA to renew.
        until = self._roster.current().parties[request.name].not_after
        if registrar.last_second(own, now=now) < until + LEAST_GAIN_S:
            return None
        try:
            pem, data = registrar.renew_client(folder, own, request, statement, now=now)
        except WireError as error:
            raise rejection(pb.REQUEST_DIFFERS, "statement", "one for this TLS key", one_line(str(error))) from None
        version = self._roster.refresh().version
        self._record("renewed", client=request.name, until=certificates.validity(pem)[1], roster=version)
        return registrar.pack_renewed(folder, pem, data)

    def _deliver(self, request: enrollment.Request, data: bytes, poll_ms: int) -> pb.EnrolReply:
        """Return the answer of the CA to a request, or put it into the queue.

        Raises:
            RejectionError: if it was rejected, or the queue is full.
        """
        answer = queue_files.read_answer(self.queue, request.name)
        if answer is not None and answer.request == queue_files.digest(data):
            if not answer.bundle:
                raise rejection(pb.REQUEST_REJECTED, "request", "one that is signed", f"no: {answer.reason}")
            if self._counts(request.name, answer.bundle):
                self._say(request.name, "delivered")
                return pb.EnrolReply(bundle=answer.bundle)
        elif self._queue(data, request):
            self._say(request.name, "queued", fingerprint=fingerprint(data))
        else:
            most = queue_files.MAX_WAITING
            raise rejection(pb.QUEUE_FULL, "queue", f"at most {most} requests", "one more")
        return pb.EnrolReply(pending=pb.Wait(retry_after_ms=poll_ms))

    def _queue(self, data: bytes, request: enrollment.Request) -> bool:
        with store_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            make_private(self.queue, below=self.folder)
        return queue_files.put(self.queue, data, request)

    def _counts(self, name: str, bundle: bytes) -> bool:
        """Return whether a bundle's certificate counts here already: a site with it would be refused for good else."""
        try:
            serial = certificates.serial_number(enrollment.unpack_bundle(bundle)[0])
        except (WireError, ValueError):
            return False
        known = self._roster.current().parties.get(name)
        return known is not None and serial in known.serials

    # ---- what comes back from the CA ----

    def look(self) -> None:
        """Take over the roster and this server's own certificate from the queue, and ask for the next one in time."""
        with self._lock:
            for take in (self._take_roster, self._renew_own, self._extend_roster):
                try:
                    take()
                # A queue that was put back wrong must not end the service, nor one file in it the other steps; the
                # next look may find it mended.
                except (FedtuneError, OSError, ValueError) as error:
                    self._say("", "warning", step=take.__name__, text=f"queue: {one_line(str(error))}")

    def _take_roster(self) -> None:
        data = queue_files.read_regular(self.queue / queue_files.ROSTER, MAX_BYTES)
        if data is None or (stamp := queue_files.digest(data)) == self._seen:
            return
        if data != self._roster.data:
            try:
                version = registrar.install_roster(self._identity.folder, data, now=int(self._now())).version
            # It stays as it is. A disk that is full, or a folder that another process writes, passes: tried again.
            except WireError:
                self._seen = stamp
                raise
            self._roster.refresh()
            self._record("roster", version=version)
        self._seen = stamp

    def _renew_own(self) -> None:
        """Install this server's own new certificate, or ask for one from two thirds of the life of the old on."""
        name, folder = self._identity.name, self._identity.folder
        pem = (folder / CERTIFICATE).read_bytes()
        waiting = queue_files.read_regular(self.queue / f"{name}{queue_files.REQUEST}", queue_files.MAX_REQUEST_BYTES)
        answer = queue_files.read_answer(self.queue, name)
        if waiting is not None and (answer is None or answer.request != queue_files.digest(waiting)):
            return  # it lies in the queue
        if answer is not None and answer.bundle:
            renewed = enrollment.unpack_bundle(answer.bundle)[0]
            begins, ends = certificates.validity(renewed)
            if renewed != pem and ends > certificates.validity(pem)[1]:
                # The clock of the CA may be ahead of this one. Another request would take this answer's place.
                if begins > self._now():
                    return
                until = enrollment.accept_bundle(folder, answer.bundle, now=int(self._now())).not_after
                self._roster.refresh()
                self._record("renewed", client=name, until=until)
                return
        begin, end = certificates.validity(pem)
        if self._now() >= begin + (end - begin) * 2 // 3:
            _, org, _ = certificates.spiffe_parts(pem)
            hosts = certificates.hosts_of(pem)
            data = enrollment.make_request(folder, name=name, org=org, role="coordinator", hosts=hosts)
            self._queue(data, enrollment.read_request(data))
            self._say(name, "queued", fingerprint=fingerprint(data))

    def _extend_roster(self) -> None:
        """Have the registrar extend the roster in time, and say when its delegation ends."""
        folder, now = self._identity.folder, int(self._now())
        own = registrar.load_registrar(folder, self._roster.current())
        if own is None:
            return
        if registrar.extend_roster(folder, own, now=now):
            self._record("roster", version=self._roster.refresh().version)
        if own.delegation.not_after - now < registrar.WARN_DAYS * registrar.DAY_S:
            ends = format_time(own.delegation.not_after)
            self._say("", "warning", text=f"the delegation of the registrar ends on {ends}; fedtune enroll delegate")

    # ---- shared ----

    def _refuse(self, name: str, error: RejectionError) -> pb.EnrolReply:
        code = reason_name(error.refusal.reason)
        self._record("refused", client=name, reason=one_line(str(error)), code=code)
        return pb.EnrolReply(refusal=error.refusal)

    def _say(self, name: str, kind: str, *, step: str = "", **fields: str) -> None:
        """Record an event of a name or a step, unless it is the one that was recorded of it last."""
        said, about = f"{kind} {fields}", f"{name} {step}"
        if self._said.get(about) != said:
            if len(self._said) >= MAX_FORGOTTEN:
                self._said.clear()
            self._said[about] = said
            self._record(kind, **({"client": name} if name else {}), **fields)


def read(data: bytes) -> enrollment.Request:
    """Return a request whose signatures hold.

    Raises:
        RejectionError: if it is none.
    """
    if len(data) > queue_files.MAX_REQUEST_BYTES:
        expected = f"at most {queue_files.MAX_REQUEST_BYTES} bytes"
        raise rejection(pb.MALFORMED, "request", expected, f"{len(data)}")
    try:
        return enrollment.read_request(data)
    except WireError as error:
        raise rejection(pb.MALFORMED, "request", "a request signed by both of its keys", one_line(str(error))) from None
