"""Who calls: the party that a certificate and the roster name, looked at with every call and as long as it lasts."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import grpc

from fedtune.link.pki.certificates import is_issued_by, key_digest, serial_number, spiffe_parts, validity
from fedtune.link.pki.identity import format_time
from fedtune.link.pki.roster import SKEW_S, Party, RosterFile
from fedtune.link.rejections import RejectionError, rejection
from fedtune.link.server.blocklist import Blocklist
from fedtune.wire.v1 import link_pb2 as pb

CallContext: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
UNKNOWN = "(unknown)"
"""Name in the log of a caller whose certificate names no party."""


@dataclass(frozen=True)
class Caller:
    """What the certificate of a connection says, which TLS has verified against the federation's CA."""

    federation: str
    name: str
    serial: str
    not_before: int
    """Seconds since 1970."""
    not_after: int
    tls_key: str = ""
    """SHA-256 (hex) of the certificate's public key."""
    pem: bytes = b""


class Callers:
    """Admits callers by the newest roster and blocklist."""

    def __init__(
        self,
        roster: RosterFile,
        blocklist: Blocklist,
        *,
        ca: bytes = b"",
        now: Callable[[], float] = time.time,
        excuse: Callable[[str], None] = lambda name: None,
    ) -> None:
        """Bind what admits callers.

        Args:
            roster: parties and their keys.
            blocklist: clients whose calls are refused.
            ca: of the federation (PEM), which those of a registrar are not signed by; empty: none of these comes here.
            now: seconds since 1970.
            excuse: called with the name of a client that only this server's own roster keeps out.
        """
        self._roster, self._blocklist, self._ca, self._now, self._excuse = roster, blocklist, ca, now, excuse

    def admit(self, caller: Caller) -> Party:
        """Return the client that a caller is; asked again while a call lasts, since the answer may change.

        Raises:
            RejectionError: if it may not call.
        """
        roster, now = self._roster.current(), self._now()
        if caller.federation != roster.federation:
            raise rejection(pb.WRONG_FEDERATION, "certificate", roster.federation, caller.federation)
        party = roster.parties.get(caller.name)
        if party is None:
            raise rejection(pb.NOT_IN_ROSTER, "certificate", f"a party of {roster.federation}", caller.name)
        if party.state != "active":
            raise rejection(pb.REVOKED, "roster", "an active party", f"{caller.name}, {party.state}")
        # TLS has accepted every certificate of the CA; the roster names those that still count after a renewal.
        if not self._is_known(caller, party):
            known = (*party.serials, *(entry.serial for entry in party.renewed))
            raise rejection(pb.SERIAL_UNKNOWN, "certificate", " or ".join(known), caller.serial)
        if party.role != "client":
            raise rejection(pb.WRONG_ROLE, "roster", "the role client", f"{caller.name}, {party.role}")
        # TLS looks at dates when a connection begins, which may then last for months.
        check_dates("certificate", caller.name, caller.not_before, caller.not_after, now=now)
        check_dates("roster", caller.name, party.not_before, party.not_after, now=now)
        if reason := self._blocklist.reason(caller.name):
            raise rejection(pb.BARRED, "operator", f"{caller.name} to be admitted", reason)
        # Last: what is wrong above needs a person at the site, and this one at the coordinator. Such a roster may still
        # name clients that have been revoked since.
        if now > roster.valid_until:
            # The client is here and does its part: no round must give it up for what the coordinator has missed.
            self._excuse(caller.name)
            got = f"version {roster.version}, which ended on {format_time(roster.valid_until)}"
            raise rejection(pb.ROSTER_OLD, "roster", "a roster on the server that is valid", got)
        return party

    def _is_known(self, caller: Caller, party: Party) -> bool:
        """Return whether a certificate is one of those that the roster names."""
        # A registrar chooses the serial numbers of its certificates, and could take one that the roster has of the CA.
        if not self._ca or is_of_ca(caller.pem, self._ca):
            return caller.serial in party.serials
        # Nor does it choose the key: the client has signed which TLS key is its own.
        return any(
            (entry.serial, entry.tls_key) == (caller.serial, caller.tls_key) and caller.not_after <= entry.not_after
            for entry in party.renewed
        )

    def exclusion(self, name: str) -> str:
        """Return why a client may not call, whatever certificate it brings; empty if it may.

        A roster of this server that has ended excludes none: that is for the coordinator to mend.
        """
        party = self._roster.current().parties.get(name)
        if party is None or party.role != "client":
            return "it is no client of the roster"
        if (state := party.state) != "active":
            return f"it is {state}"
        if self._now() > party.not_after:
            return f"its time in the roster ended on {format_time(party.not_after)}"
        reason = self._blocklist.reason(name)
        return f"it is barred: {reason}" if reason else ""


def check_dates(what: str, name: str, begin: int, end: int, *, now: float) -> None:
    """Check that a client's time has begun and is not over.

    Raises:
        RejectionError: if it has not, or is.
    """
    if now > end:
        raise rejection(pb.CERTIFICATE_ENDED, what, f"{name} until {format_time(end)}", "a call after that")
    if now < begin - SKEW_S:
        raise rejection(pb.CERTIFICATE_ENDED, what, f"{name} from {format_time(begin)}", "a call before that")


def identify(context: CallContext) -> Caller:
    """Return who calls, by its certificate alone.

    Raises:
        RejectionError: if it names no party of a federation.
    """
    (pem,) = context.auth_context()["x509_pem_cert"]
    return read_certificate(bytes(pem))


# Every call brings the certificate, which is the same for a whole connection.
@lru_cache(maxsize=1024)
def read_certificate(pem: bytes) -> Caller:
    """Return what a certificate says.

    Raises:
        RejectionError: if it names no party of a federation.
    """
    try:
        federation, _, name = spiffe_parts(pem)
        return Caller(federation, name, serial_number(pem), *validity(pem), key_digest(pem), pem)
    except ValueError as error:
        raise rejection(pb.NOT_IN_ROSTER, "certificate", "one made by fedtune enroll", error) from None


# Asked with every call, as the certificate.
@lru_cache(maxsize=1024)
def is_of_ca(pem: bytes, ca: bytes) -> bool:
    """Return whether a certificate is signed by the federation's own CA, and not by that of a registrar."""
    try:
        return is_issued_by(pem, ca)
    except ValueError:
        return False


def caller_name(context: CallContext) -> str:
    """Return the name in the caller's certificate, for a log."""
    try:
        return identify(context).name
    except RejectionError:
        return UNKNOWN
