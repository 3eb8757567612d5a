"""What a client and its server know of each other: the hello, the run's signed plan, and the roster."""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256

import grpc

from fedtune.errors import ConfigError, Fault, TemporaryError, WireError
from fedtune.link.audit_log import RecordEvent
from fedtune.link.client.backoff import Backoff
from fedtune.link.client.channel import LinkStub
from fedtune.link.client.server_certificate import ServerCertificate, certificate_fault, verify_proof
from fedtune.link.client.server_limits import within_ranges
from fedtune.link.envelopes import PROTOCOL, build_version, expect_fields, verify_envelope
from fedtune.link.pki.identity import Identity, expiry_warnings
from fedtune.link.pki.roster import Party, Roster, RosterFile, check_successor, decode, find_party
from fedtune.link.rejections import RejectionError, describe, one_line
from fedtune.store.files import write_bytes
from fedtune.wire.v1 import link_pb2 as pb

CALL_S = 10.0
"""Deadline of a call beyond the time for which the server may hold it."""
DAY_S = 24 * 3600.0
ROSTER_RETRY_S = 60.0
"""After which a server is asked again for a roster that it had not; one whose roster ends soon asks only each hour."""
RUN_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Greeting:
    """What the server has said of itself and the run."""

    epoch: int
    limits: pb.Limits
    run: str
    plan: pb.Envelope
    recipe: bytes
    server: ServerCertificate | None = None
    """As the coordinator has signed it for this hello."""

    @property
    def recipe_digest(self) -> bytes:
        return sha256(self.recipe).digest()


class Session:
    """The state that a hello sets up; one for each client."""

    def __init__(
        self,
        identity: Identity,
        roster: RosterFile,
        calls: LinkStub,
        backoff: Backoff,
        *,
        record: RecordEvent,
        now: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
        redial: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin before the first hello.

        Args:
            identity: of this client.
            roster: keys of the parties; a newer one from the server takes its place.
            calls: of the server.
            backoff: pauses after refusals.
            record: receives the events.
            now: seconds since 1970.
            clock: seconds from any start.
            redial: opens another connection to the server.
        """
        self.identity = identity
        self._roster, self._calls, self._backoff, self._record, self._now = roster, calls, backoff, record, now
        self._clock, self._redial = clock, redial
        self._asking = threading.Lock()  # for a roster: one thread does, the others have what it brings
        self._asked_at, self._asked_version = float("-inf"), 0
        self._said_version = 0  # of the server's roster, as it said last
        self.process = secrets.randbits(63) + 1
        """Random number by which the server tells two processes under one name apart."""
        self.greeting: Greeting | None = None
        """Of the server process that is answering; None before a hello, and after the server has gone away."""

    def hello(self, *, wait: bool = True) -> Greeting:
        """Say hello, and return what the server says, verified.

        Args:
            wait: whether to go on until the server takes this site and has a roster that is valid here, or to give up.

        Raises:
            ConfigError: if the server does not take this client, or is not the one it should be.
            grpc.RpcError: if it cannot be reached.
        """
        while True:
            request = self._hello_request()
            reply = self._calls.hello(request, timeout=CALL_S)
            # Some refusals pass: an expired roster is renewed at the server without a restart here.
            if reply.HasField("refusal"):
                if not wait and reply.refusal.passing:
                    raise TemporaryError(Fault("", "a server that takes this site now", describe(reply.refusal)))
                self._backoff.wait_after_refusal(reply.refusal)
                continue
            if reply.roster:
                self._install_roster(reply.roster)
            self.hear_version(reply.roster_version)
            roster = self._roster.current()
            fault = f"the roster (version {roster.version}) has ended by this clock, and the server has none newer"
            if self._now() <= roster.valid_until:
                greeting = self._verify(reply, request.nonce)
                assert greeting.server is not None  # `_verify` has seen its proof
                if not (fault := certificate_fault(greeting.server, roster, now=self._now())):
                    return greeting
            if not wait:
                expected, hint = "a server and a roster that are valid now", "ask the coordinator, and check this clock"
                raise ConfigError(Fault("link.address", expected, fault, hint))
            # What the coordinator renews, it renews without a restart here; the next connection has it.
            self._backoff.wait_for_server(fault)
            self._redial()

    def _verify(self, reply: pb.HelloReply, nonce: int) -> Greeting:
        """Return what a server says of itself and the run.

        Raises:
            ConfigError: if it is not signed by a coordinator of the roster.
        """
        if not reply.HasField("proof"):
            expected, hint = "a server that proves who it is", "its fedtune must be 0.3 or later"
            raise ConfigError(Fault("link.address", expected, "one that says nothing of its certificate", hint))
        try:
            server = verify_proof(reply, self.identity, nonce, self.find_coordinator)
            plan, _ = verify_envelope(reply.plan, self.find_coordinator)
            # The recipe itself is not signed: the plan's header names its digest.
            recipe_digest = sha256(reply.recipe).digest()
            expect_fields(plan, federation=self.identity.federation, kind=pb.PLAN, recipe=recipe_digest)
        except RejectionError as error:
            raise ConfigError(Fault("link.address", "a run that the coordinator has signed", str(error))) from None
        # The run id becomes the name of a folder here: "../" in it would let a server write anywhere.
        if not RUN_ID.fullmatch(plan.run):
            raise ConfigError(Fault("link.address", "a run id of 16 hex digits", repr(plan.run[:50])))
        return Greeting(reply.epoch, within_ranges(reply.limits), plan.run, reply.plan, reply.recipe, server)

    def _hello_request(self) -> pb.HelloRequest:
        return pb.HelloRequest(
            protocols=[PROTOCOL],
            federation=self.identity.federation,
            build=build_version(),
            roster_version=self.roster_version,
            process=self.process,
            nonce=secrets.randbits(64),
        )

    def server_fault(self) -> str:
        """Return why the connection to the server that is answering must end; empty if it may go on."""
        if (greeting := self.greeting) is None or greeting.server is None:
            return ""
        return certificate_fault(greeting.server, self._roster.current(), now=self._now())

    def warnings(self) -> Sequence[str]:
        """Return a sentence for each of roster and certificate of this site that ends soon."""
        return expiry_warnings(self.identity, self._roster.current(), now=self._now())

    @property
    def roster_version(self) -> int:
        """Of the roster that this site has."""
        return self._roster.current().version

    def hear_version(self, version: int) -> None:
        """Note the version of the server's roster, as a reply says it; 0: of a release that does not."""
        self._said_version = max(self._said_version, version)

    def follow_roster(self) -> None:
        """Take the server's roster where it is newer, or the own one ends within a day; work in hand goes on.

        Raises:
            grpc.RpcError: if the server cannot be reached.
        """
        with self._asking:
            self._follow_roster()

    def _follow_roster(self) -> None:
        roster = self._roster.current()
        left_s = roster.valid_until - self._now()
        # A version that is said for the first time at once; what has been asked for in vain not with every call.
        pause_s = ROSTER_RETRY_S if left_s < 0 or self._said_version > roster.version else 60 * ROSTER_RETRY_S
        is_news = self._said_version > max(roster.version, self._asked_version)
        is_due = left_s < DAY_S or self._said_version > roster.version
        if not is_news and not (is_due and self._clock() - self._asked_at >= pause_s):
            return
        # For the roster alone: the run, and what is under way of it, stay as they are.
        self._asked_at, self._asked_version = self._clock(), self._said_version
        reply = self._calls.hello(self._hello_request(), timeout=CALL_S)
        if reply.roster:
            self._install_roster(reply.roster)

    def roster(self) -> Roster:
        """Return the roster of this site."""
        return self._roster.current()

    def find_coordinator(self, key_id: bytes) -> Party | None:
        """Return the coordinator whose signing key has this id; None for any other key.

        Where none has it, or the roster has ended, the server is asked for a newer one first: its coordinator may have
        renewed it, or have a new key, since this site said hello.
        """
        party = self._coordinator(key_id)
        if party is None:
            with suppress(grpc.RpcError, ValueError):  # ValueError: the channel was closed
                self.follow_roster()
            party = self._coordinator(key_id)
        return party

    def _coordinator(self, key_id: bytes) -> Party | None:
        roster = self._roster.current()
        # It may still name a coordinator that has been revoked since.
        if self._now() > roster.valid_until:
            return None
        party = find_party(roster, key_id)
        # The role, too: a client of the federation must not give tasks to the others.
        return party if party is not None and party.role == "coordinator" else None

    def _install_roster(self, data: bytes) -> None:
        """Install a newer roster; the CA has signed it, so the server that carries it need not be trusted."""
        try:
            decoded = decode(data, self.identity.root)
            roster = check_successor(self._roster.current(), decoded, now=int(self._now()))
        except WireError as error:
            self._record("refused", reason=one_line(str(error)), code="ROSTER")
            return
        write_bytes(self.identity.folder / "roster", data)
        # At once: the roster before it may have expired, and this connection would be given up for that.
        self._roster.refresh()
        self._record("roster", version=roster.version)
