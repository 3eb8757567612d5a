"""A registrar: what the roster's root allows an online key, and what that key signs, as it stands in a roster file.

It may say that a further certificate counts for an active client, and that the roster lasts longer; no more can be
written down. Each client signs which TLS key is its own: the key of a registrar alone gives no certificate that counts.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import WireError
from fedtune.link.pki.certificates import are_trust_anchors
from fedtune.link.pki.dsse import (
    MAX_BYTES,
    canonical_json,
    decode_base64,
    make_dsse,
    parse_dsse,
    parse_json,
    read_fields,
    verify_dsse,
)
from fedtune.link.pki.signing import verify

STRIDE = 1_000_000
"""Versions of a registrar between two of the root's, which are multiples of this from the first delegation on."""
MAX_DAYS = 92
"""Longest delegation."""
KIND = "application/vnd.fedtune.renewals.v1+json"
STATEMENT = "application/vnd.fedtune.tls-key.v1+json"
START = b'{"base":'
"""Of a roster file with renewals: the envelope of another one begins with its payload."""
DIGEST = re.compile(r"[0-9a-f]{64}")
SERIAL = re.compile(r"[0-9a-f]{1,40}")
LATEST = 2**53


@dataclass(frozen=True)
class Delegation:
    """What the root says of a registrar."""

    key: bytes
    """Ed25519 public key that signs renewals, 32 bytes."""
    ca: bytes
    """PEM of the CA that issues its certificates. Servers alone trust it, and for clients alone."""
    not_after: int
    """Seconds since 1970; nothing that a registrar signs counts after it."""


@dataclass(frozen=True)
class Renewed:
    """A certificate that a registrar has issued."""

    name: str
    """Of the client."""
    serial: str
    """Lower-case hex."""
    tls_key: str
    """SHA-256 (hex) of the certificate's public key."""
    not_after: int
    """Seconds since 1970."""
    until: int
    """Until when the client itself says that this TLS key is its own."""
    signature: bytes
    """By the client's signing key, over that."""


@dataclass(frozen=True)
class Renewals:
    """What a registrar has signed on top of a roster of the root."""

    base: bytes
    """The root's roster as it was signed."""
    version: int
    valid_until: int
    """Seconds since 1970."""
    entries: tuple[Renewed, ...]


# ---- what a client says of its TLS key ----


def statement_payload(federation: str, name: str, tls_key: str, until: int) -> bytes:
    """Return what a client signs: this TLS key is mine until then."""
    return canonical_json({"federation": federation, "name": name, "tls_key": tls_key, "until": until})


def make_statement(key: Ed25519PrivateKey, federation: str, name: str, tls_key: str, until: int) -> bytes:
    """Return a client's signed statement of its TLS key."""
    return make_dsse(STATEMENT, statement_payload(federation, name, tls_key, until), key)


def read_statement(data: bytes, public: bytes, federation: str, name: str, tls_key: str) -> tuple[int, bytes]:
    """Return until when a client says that a TLS key is its own, and its signature.

    Raises:
        WireError: if it does not say that of this key, or is not signed by the client.
    """
    body = verify_dsse(data, STATEMENT, public, "statement")
    said = read_fields(body, {"federation": str, "name": str, "tls_key": str, "until": int}, "statement")
    if said[:3] != (federation, name, tls_key):
        raise WireError(f"statement: expected the TLS key of {name} in {federation}; got another")
    _, ((_, signature),) = parse_dsse(data, STATEMENT, "statement")
    return said[3], signature


def is_stated(entry: Renewed, public: bytes, federation: str) -> bool:
    """Return whether a client has signed that the TLS key of a renewed certificate is its own."""
    payload = statement_payload(federation, entry.name, entry.tls_key, entry.until)
    return verify(public, STATEMENT, payload, entry.signature)


# ---- the delegation within a roster ----


def delegation_json(delegation: Delegation) -> dict[str, Any]:
    """Return a delegation as it stands in a roster."""
    return {
        "key": base64.b64encode(delegation.key).decode(),
        "ca": delegation.ca.decode(),
        "not_after": delegation.not_after,
    }


def decode_delegation(body: Any) -> Delegation:
    """Return the delegation of a roster.

    Raises:
        WireError: if it is malformed.
    """
    key, ca, not_after = read_fields(body, {"key": str, "ca": str, "not_after": int}, "roster: delegation")
    public = decode_base64(key, "roster: delegation: key")
    try:
        is_anchor = are_trust_anchors(ca.encode())
    except ValueError:
        is_anchor = False
    if len(public) != 32 or not 0 <= not_after <= LATEST or not is_anchor:
        raise WireError("roster: delegation: expected a key, a CA and a time; got others")
    return Delegation(public, ca.encode(), not_after)


# ---- the renewals ----


def encode_renewals(renewals: Renewals, federation: str, key: Ed25519PrivateKey) -> bytes:
    """Return the file of a roster with renewals, signed by the registrar."""
    entries = [
        {
            "name": entry.name,
            "serial": entry.serial,
            "tls_key": entry.tls_key,
            "not_after": entry.not_after,
            "until": entry.until,
            "signature": base64.b64encode(entry.signature).decode(),
        }
        for entry in renewals.entries
    ]
    body = {
        "federation": federation,
        "base": sha256(renewals.base).hexdigest(),
        "version": renewals.version,
        "valid_until": renewals.valid_until,
        "entries": entries,
    }
    signed = make_dsse(KIND, canonical_json(body), key)
    return canonical_json({"base": renewals.base.decode(), "renewals": signed.decode()}) + b"\n"


def split_file(data: bytes) -> tuple[bytes, bytes]:
    """Return the root's roster in a file with renewals, and the envelope of these; neither is verified.

    Raises:
        WireError: if it is malformed.
    """
    if len(data) > MAX_BYTES:
        raise WireError(f"roster: expected at most {MAX_BYTES} bytes; got more")
    body = parse_json(data, "roster")
    base, signed = read_fields(body, {"base": str, "renewals": str}, "roster")
    if not (base.isascii() and signed.isascii()) or data.removesuffix(b"\n") != canonical_json(body):
        raise WireError("roster: expected the file as it was written; got another spelling of it; fetch it again")
    return base.encode(), signed.encode()


def decode_renewals(base: bytes, signed: bytes, delegation: Delegation, federation: str) -> Renewals:
    """Return what a registrar has signed on top of a roster; whom it concerns is checked where that is known.

    Raises:
        WireError: if it is malformed, signed by another key, of another roster, or lasts longer than the delegation.
    """
    body = verify_dsse(signed, KIND, delegation.key, "roster: renewals")
    said, digest, version, valid_until, entries = read_fields(
        body, {"federation": str, "base": str, "version": int, "valid_until": int, "entries": list}, "roster: renewals"
    )
    if said != federation or digest != sha256(base).hexdigest():
        raise WireError("roster: renewals: expected those of the roster that they stand beside; got others")
    if not 0 <= valid_until <= delegation.not_after:
        raise WireError("roster: renewals: expected an end within the delegation; got a later one")
    return Renewals(base, version, valid_until, tuple(decode_entry(entry, delegation) for entry in entries))


def decode_entry(body: Any, delegation: Delegation) -> Renewed:
    """Return one renewed certificate.

    Raises:
        WireError: if it is malformed, or lasts longer than the delegation or than its client has signed.
    """
    name, serial, tls_key, not_after, until, signature = read_fields(
        body,
        {"name": str, "serial": str, "tls_key": str, "not_after": int, "until": int, "signature": str},
        "roster: renewals: entry",
    )
    if not SERIAL.fullmatch(serial) or not DIGEST.fullmatch(tls_key) or not 0 <= until <= LATEST:
        raise WireError("roster: renewals: expected a serial number, a key's digest and a time; got others")
    if not 0 <= not_after <= min(delegation.not_after, until):
        raise WireError(f"roster: renewals: {name[:50]!r}: expected an end within the delegation; got a later one")
    return Renewed(name, serial, tls_key, not_after, until, decode_base64(signature, "roster: renewals: signature"))


def newest_first(entries: Sequence[Renewed], entry: Renewed, *, most: int) -> tuple[Renewed, ...]:
    """Return the entries with one more; of each client the newest stay."""
    own = [known for known in entries if known.name == entry.name]
    return (*(known for known in entries if known.name != entry.name), *(*own, entry)[-most:])
