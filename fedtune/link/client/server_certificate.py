"""The server's certificate: what its coordinator has signed of it, and whether roster and clock still allow it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256

from fedtune.link.envelopes import expect_fields, verify_envelope
from fedtune.link.pki import certificates
from fedtune.link.pki.identity import Identity, format_time
from fedtune.link.pki.roster import SKEW_S, Party, Roster
from fedtune.link.rejections import rejection
from fedtune.wire.v1 import link_pb2 as pb


@dataclass(frozen=True)
class ServerCertificate:
    """What the certificate of a connection says of the server."""

    name: str
    serial: str
    not_before: int
    """Seconds since 1970."""
    not_after: int


def verify_proof(
    reply: pb.HelloReply, identity: Identity, nonce: int, find_author: Callable[[bytes], Party | None]
) -> ServerCertificate:
    """Return the certificate that a coordinator of the roster has signed for this hello.

    TLS alone says only that the CA once issued a certificate for this host; it may have been replaced since, its key in
    other hands.

    Raises:
        RejectionError: if no coordinator has signed it, or it is not the CA's for that coordinator.
    """
    header, author = verify_envelope(reply.proof, find_author)
    expect_fields(header, federation=identity.federation, kind=pb.SERVER, to=identity.name)
    expect_fields(header, nonce=nonce, epoch=reply.epoch)
    pem = reply.certificate
    if len(header.parts) != 1 or header.parts[0].digest != sha256(pem).digest():
        raise rejection(pb.DIGEST, "certificate", "the certificate that was signed", "another")
    try:
        federation, _, name = certificates.spiffe_parts(pem)
        if (federation, name) != (identity.federation, author.name) or not certificates.is_issued_by(pem, identity.ca):
            expected = f"the certificate of {author.name} in {identity.federation}"
            raise rejection(pb.SERIAL_UNKNOWN, "certificate", expected, f"one of {name} in {federation}")
        return ServerCertificate(name, certificates.serial_number(pem), *certificates.validity(pem))
    except ValueError as error:
        raise rejection(pb.SERIAL_UNKNOWN, "certificate", "one of this federation", error) from None


def certificate_fault(server: ServerCertificate, roster: Roster, *, now: float) -> str:
    """Return why a connection with this certificate must end; empty if it may go on."""
    party = roster.parties.get(server.name)
    if party is None or party.state != "active" or party.role != "coordinator":
        return f"{server.name} is no active coordinator of the roster (version {roster.version})"
    if server.serial not in party.serials:
        return f"the roster (version {roster.version}) has replaced the certificate of {server.name}"
    for what, begin, end in (
        (f"the certificate of {server.name}", server.not_before, server.not_after),
        (f"the time of {server.name} in the roster", party.not_before, party.not_after),
    ):
        if now > end:
            return f"{what} ended on {format_time(end)}"
        if now < begin - SKEW_S:
            return f"{what} begins on {format_time(begin)}"
    return ""
