"""Pauses of a client between failed calls, and the decision whether another try can help at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

import grpc

from fedtune.errors import ConfigError, Fault, TemporaryError
from fedtune.link.audit_log import RecordEvent
from fedtune.link.client.channel import TRANSIENT_STATUS
from fedtune.link.client.jobs import Job, StoppedError
from fedtune.link.client.route import Diagnosis, diagnose
from fedtune.link.pki.identity import Identity
from fedtune.link.rejections import describe, one_line, reason_name
from fedtune.link.settings import JoinSettings
from fedtune.wire.v1 import link_pb2 as pb

REPORT_INTERVAL_S = 300.0
"""At most so often a client says why it cannot reach its server: a diagnosis opens connections of its own."""
STABLE_S = 60.0
"""Of successful calls, after which pauses start again from the shortest."""
REFUSED_PAUSE_S = 1.0
SERVER_PAUSE_S = 5.0
"""After a server that this client does not trust now: a hello is larger than other calls."""
CLOSED_PAUSE_S = 0.1
MAX_DOUBLINGS = 10
"""Of the first pause; beyond them the cap of the settings counts, and a float would overflow in the end."""
Response = TypeVar("Response")


class Backoff:
    """Waits after failed calls: up to a limit that doubles, drawn at random, reset after a minute of good calls.

    Every thread of a client shares one. Its counters are read and written without a lock: a lost increment only makes a
    random pause shorter.
    """

    def __init__(
        self,
        identity: Identity,
        settings: JoinSettings,
        *,
        stop: threading.Event,
        record: RecordEvent,
        clock: Callable[[], float],
    ) -> None:
        """Begin without failures.

        Args:
            identity: of the client, for the diagnosis of a connection.
            settings: address, pauses and patience.
            stop: set when the client is to end.
            record: receives the events.
            clock: seconds from any start.
        """
        self._identity, self._settings, self._stop, self._record, self._clock = identity, settings, stop, record, clock
        self._failures, self._failed_at = 0, 0.0
        self._reported_at = float("-inf")
        self._refusal = "", 0.0  # that was recorded last, and when
        self._unreachable_since: float | None = None

    def retry(self, job: Job, call: Callable[[], Response]) -> Response:
        """Return the response of a call, which is repeated until there is one.

        Raises:
            StoppedError: if the job should give up.
            ConfigError: if no repetition can help.
        """
        while True:
            job.check()
            try:
                return call()
            except grpc.RpcError as error:
                self.wait_after_error(error, job)
            except ValueError:
                # The channel was closed before the call began, in favour of another one, or of none.
                job.wait(CLOSED_PAUSE_S)

    @property
    def unreachable_s(self) -> float:
        """Seconds since the server has stopped to answer; 0 while it answers."""
        return 0.0 if self._unreachable_since is None else self._clock() - self._unreachable_since

    def note_success(self) -> None:
        """Note that the server answers."""
        now = self._clock()
        self._unreachable_since = None
        if self._failures and now - self._failed_at > STABLE_S:
            self._failures = 0
        if self._reported_at > float("-inf"):
            self._record("reached", server=self._settings.address)
            self._reported_at = float("-inf")

    def wait_after_error(self, error: grpc.RpcError, job: Job | None = None) -> None:
        """Wait before a failed call is repeated.

        Args:
            error: what gRPC raised.
            job: whose call it was; without one, the main loop's.

        Raises:
            ConfigError: if no repetition can help.
            StoppedError: if the client or the job should give up.
        """
        self._check(job)
        status, details = error.code(), error.details()
        # Such as UNIMPLEMENTED of another service on that port: to wait would hide the mistake for days.
        if status not in TRANSIENT_STATUS:
            raise ConfigError(Fault("link.address", "a fedtune server", f"{status.name}: {one_line(details or '')}"))
        self._wait(job, None)

    def wait_without_way(self, why: Diagnosis) -> None:
        """Wait before the way to the server is tried again, which ends on this side of it.

        Raises:
            ConfigError: if no repetition can help.
            StoppedError: if the client should give up.
        """
        self._check(None)
        # At once, whatever was reported last: a wrong password that is repeated locks the account.
        if why.permanent:
            raise ConfigError(Fault("link.address", "a server of this federation", why.reason))
        self._wait(None, why)

    def _wait(self, job: Job | None, why: Diagnosis | None) -> None:
        now = self._clock()
        self._failed_at = now
        if self._unreachable_since is None:
            self._unreachable_since = now
        # Only the main loop reports: the calls of all jobs fail for the same reason.
        if job is None and now - self._reported_at >= REPORT_INTERVAL_S:
            self._report(now, why)
        if self._settings.patience_s and now - self._unreachable_since > self._settings.patience_s:
            waited = f"{now - self._unreachable_since:.0f} s without a connection"
            hint = "start join again later"
            raise TemporaryError(Fault("link.address", "a server that can be reached", waited, hint))
        # A random share of the limit: clients that lost the same server must not all come back at the same moment.
        self._failures = min(self._failures + 1, 30)
        doubled = self._settings.backoff_s * 2.0 ** min(self._failures - 1, MAX_DOUBLINGS)
        share = int.from_bytes(os.urandom(4), "little") / 2**32
        (job.over if job is not None else self._stop).wait(share * min(self._settings.backoff_cap_s, doubled))
        self._check(job)

    def wait_after_refusal(self, refusal: pb.Refusal) -> None:
        """Wait before a server is asked again that has refused this client as such.

        Raises:
            ConfigError: if the refusal is final, and a person must act.
            StoppedError: if the client is to end.
        """
        self._report_refusal(describe(refusal), reason_name(refusal.reason))
        if not refusal.passing:
            raise ConfigError(Fault("", "a server that takes this site", describe(refusal)))
        self._stop.wait(REFUSED_PAUSE_S)
        self._check(None)

    def wait_for_server(self, fault: str) -> None:
        """Wait before a server is asked again that this client does not trust now, for a reason that can pass.

        Raises:
            StoppedError: if the client is to end.
        """
        self._report_refusal(f"{fault}; trying again", "SERVER")
        self._stop.wait(SERVER_PAUSE_S)
        self._check(None)

    def _report_refusal(self, reason: str, code: str) -> None:
        now = self._clock()
        # A refusal that passes is repeated with every try: once in a while is enough for a log.
        if reason != self._refusal[0] or now - self._refusal[1] >= REPORT_INTERVAL_S:
            self._record("refused", reason=reason, code=code)
            self._refusal = reason, now

    def _report(self, now: float, why: Diagnosis | None) -> None:
        self._reported_at = now
        diagnosis = why or diagnose(self._identity, self._settings)
        if diagnosis.permanent:
            raise ConfigError(Fault("link.address", "a server of this federation", diagnosis.reason))
        self._record("unreached", server=self._settings.address, reason=diagnosis.reason)

    def _check(self, job: Job | None) -> None:
        if job is not None:
            job.check()
        elif self._stop.is_set():
            raise StoppedError("stopped")
