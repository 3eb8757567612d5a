"""A running client that asks for its next certificate: from two thirds of the life of its own on, until it has it."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from fedtune.errors import FedtuneError, WireError
from fedtune.link.audit_log import RecordEvent
from fedtune.link.client.channel import LinkStub
from fedtune.link.pki import enrollment
from fedtune.link.pki.certificates import key_digest, validity
from fedtune.link.pki.delegation import make_statement
from fedtune.link.pki.identity import Identity, current_dates
from fedtune.link.rejections import describe, one_line
from fedtune.store.files import remove, write_bytes
from fedtune.wire.v1 import link_pb2 as pb

REQUEST = "renewal.json"
"""In the folder of the keys: one request stays the same until it is answered."""
CALL_S = 20.0
RETRY_S, LATER_S = 60.0, 3600.0
"""After a call that failed; and at most until a server is asked again."""
DAY_S = 24 * 3600
STATED_DAYS = 92
"""For which a site says that its TLS key is its own: as long as the longest delegation."""


class Renewal:
    """Asks for the next certificate of a client; one thread alone calls it."""

    def __init__(
        self,
        identity: Identity,
        calls: LinkStub,
        *,
        record: RecordEvent,
        clock: Callable[[], float],
        now: Callable[[], float],
    ) -> None:
        """Begin without a request.

        Args:
            identity: of the client; its folder has the keys, and gets the certificate.
            calls: of the server.
            record: receives the events.
            clock: seconds from any start.
            now: seconds since 1970.
        """
        self._identity, self._calls, self._record, self._clock, self._now = identity, calls, record, clock, now
        self._again_at, self._said = float("-inf"), ""

    def look(self) -> None:
        """Ask if it is time, and install what comes back; the client then dials with it."""
        begin, end = current_dates(self._identity)
        if self._now() < begin + (end - begin) * 2 / 3 or self._clock() < self._again_at:
            return
        try:
            pause_s = self._ask(end)
        # Nothing here may end a client that works: its certificate is still valid, and a warning says until when.
        except (FedtuneError, OSError) as error:
            self._say("warning", f"the next certificate of this site: {one_line(str(error))}")
            pause_s = LATER_S
        self._again_at = self._clock() + pause_s

    def _ask(self, end: int) -> float:
        """Ask once; return after how many seconds to ask again.

        Raises:
            FedtuneError: if there is no answer that can be used.
        """
        try:
            request = pb.RenewRequest(request=self._request(), statement=self._statement())
            reply = self._calls.renew(request, timeout=CALL_S)
        except ValueError:  # the channel was closed in favour of another one
            return RETRY_S
        except grpc.RpcError as error:
            # A server of a release before 0.3 does not know the call.
            return DAY_S if error.code() is grpc.StatusCode.UNIMPLEMENTED else RETRY_S
        match reply.WhichOneof("what"):
            case "bundle":
                try:
                    begins, ends = validity(enrollment.unpack_bundle(reply.bundle)[0])
                except ValueError:
                    raise WireError("bundle: expected a certificate; got something else") from None
                if ends <= end:
                    raise WireError("expected a certificate that lasts longer; got one that does not")
                # The CA's clock is ahead of this one: until then the old certificate is the one that opens connections.
                if begins > self._now():
                    return min(LATER_S, begins - self._now() + RETRY_S)
                accepted = enrollment.accept_bundle(self._identity.folder, reply.bundle, now=int(self._now()))
                remove(self._identity.folder / REQUEST)
                self._record("renewed", client=accepted.name, until=accepted.not_after)
                return RETRY_S
            case "refusal":
                self._say("warning", f"the next certificate of this site: {describe(reply.refusal)}")
                return LATER_S
            case _:
                self._say("note", "the request for the next certificate of this site waits until it is signed")
                return max(RETRY_S, min(LATER_S, reply.pending.retry_after_ms / 1000))

    def _request(self) -> bytes:
        """Return the request that was made last for these keys, or a new one.

        Raises:
            FedtuneError: if the keys or the folder cannot be used.
        """
        path, identity = self._identity.folder / REQUEST, self._identity
        try:
            data = path.read_bytes()
            if enrollment.read_request(data).key == identity.public:
                return data
        except (OSError, WireError):
            pass
        data = enrollment.make_request(identity.folder, name=identity.name, org=identity.org, role="client")
        write_bytes(path, data)
        return data

    def _statement(self) -> bytes:
        """Return this site's word that its TLS key is its own, without which no registrar could renew it."""
        identity, until = self._identity, int(self._now()) + STATED_DAYS * DAY_S
        tls_key = key_digest(identity.certificate)
        return make_statement(identity.key, identity.federation, identity.name, tls_key, until)

    def _say(self, kind: str, text: str) -> None:
        if text != self._said:
            self._said = text
            self._record(kind, text=text)
