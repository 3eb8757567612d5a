"""What a client and its server know of each other: the hello, the run's signed plan, and the roster."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from fedtune.errors import ConfigError, Fault, WireError
from fedtune.link.audit_log import RecordEvent
from fedtune.link.client.backoff import Backoff
from fedtune.link.client.channel import LinkStub
from fedtune.link.envelopes import PROTOCOL, build_version, expect_fields, verify_envelope
from fedtune.link.pki.identity import Identity
from fedtune.link.pki.roster import Party, RosterFile, check_successor, decode, find_party
from fedtune.link.rejections import RejectionError, one_line
from fedtune.store.files import write_bytes
from fedtune.wire.v1 import link_pb2 as pb

CALL_S = 10.0
"""Deadline of a call beyond the time for which the server may hold it."""
RUN_ID = re.compile(r"[0-9a-f]{16}")


@dataclass(frozen=True)
class Greeting:
    """What the server has said of itself and the run."""

    epoch: int
    limits: pb.Limits
    run: str
    plan: pb.Envelope
    recipe: bytes

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
    ) -> None:
        """Begin before the first hello.

        Args:
            identity: of this client.
            roster: keys of the parties; a newer one from the server takes its place.
            calls: of the server.
            backoff: pauses after refusals.
            record: receives the events.
            now: seconds since 1970.
        """
        self.identity = identity
        self._roster, self._calls, self._backoff, self._record, self._now = roster, calls, backoff, record, now
        self.process = secrets.randbits(63) + 1
        """Random number by which the server tells two processes under one name apart."""
        self.greeting: Greeting | None = None
        """Of the server process that is answering; None before a hello, and after the server has gone away."""

    def hello(self) -> Greeting:
        """Say hello, and return what the server says, verified.

        Raises:
            ConfigError: if the server does not take this client, or is not the one it should be.
            grpc.RpcError: if it cannot be reached.
        """
        request = pb.HelloRequest(
            protocols=[PROTOCOL],
            federation=self.identity.federation,
            build=build_version(),
            roster_version=self._roster.current().version,
            process=self.process,
        )
        # A loop, since some refusals pass: an expired roster is renewed at the server without a restart here.
        while (reply := self._calls.hello(request, timeout=CALL_S)).HasField("refusal"):
            self._backoff.wait_after_refusal(reply.refusal)
        if reply.roster:
            self._install_roster(reply.roster)
        roster = self._roster.current()
        if self._now() > roster.valid_until:
            got = f"version {roster.version}, which has expired, and none newer from the server"
            raise ConfigError(Fault("link.identity", "a roster that is valid", got, "ask the coordinator to renew it"))
        try:
            plan, _ = verify_envelope(reply.plan, self.find_coordinator)
            # The recipe itself is not signed: the plan's header names its digest.
            recipe_digest = sha256(reply.recipe).digest()
            expect_fields(plan, federation=self.identity.federation, kind=pb.PLAN, recipe=recipe_digest)
        except RejectionError as error:
            raise ConfigError(Fault("link.address", "a run that the coordinator has signed", str(error))) from None
        # The run id becomes the name of a folder here: "../" in it would let a server write anywhere.
        if not RUN_ID.fullmatch(plan.run):
            raise ConfigError(Fault("link.address", "a run id of 16 hex digits", repr(plan.run[:50])))
        return Greeting(reply.epoch, reply.limits, plan.run, reply.plan, reply.recipe)

    def find_coordinator(self, key_id: bytes) -> Party | None:
        """Return the coordinator whose signing key has this id; None for any other key."""
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
