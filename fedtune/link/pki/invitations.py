"""Invitations: one-time codes of sites that enrol over the network, and what their issuer keeps of them.

A code holds the federation's anchors, by which the site recognises the server, and the seed of a signing key that is
the code's own. Its issuer keeps the public key alone: neither its folder nor the network gives a code away.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from fedtune.errors import ConfigError, Fault, WireError
from fedtune.link.pki import codes
from fedtune.link.pki.certificates import are_trust_anchors, csr_key, parse_errors_as_value_errors, public_der
from fedtune.link.pki.dsse import canonical_json, decode_base64, parse_json, read_fields
from fedtune.link.pki.enrollment import Request, root_pem
from fedtune.link.pki.queue_files import read_regular
from fedtune.link.pki.roster import LATEST, NAME
from fedtune.link.pki.signing import fingerprint, key_id, public_bytes, sign, verify
from fedtune.store.files import remove, write_bytes

KIND = "application/vnd.fedtune.invitation.v1"
FOLDER = "invitations"
SUFFIX = ".json"
HOURS = 24
MAX_HOURS = 30 * 24
KEEP_S = 30 * 24 * 3600
"""After its end, for which an invitation is known: a site that comes late hears that, and a signed one is delivered."""
MAX_OPEN = 1000
"""Invitations that may be open: a loop that went wrong must not fill the disk."""
ADDRESS = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9][A-Za-z0-9.-]{0,252}):[0-9]{1,5}")
MAX_RECORD_BYTES = 4096


@dataclass(frozen=True)
class Code:
    """What the line says that a site pastes."""

    address: str
    """HOST:PORT of the enrolment service."""
    server: str
    """HOST:PORT of the server that the site joins afterwards."""
    name: str
    org: str
    ca: bytes
    """PEM."""
    root: bytes
    """Public key that signs rosters, 32 bytes."""
    seed: bytes
    """32 bytes, of the code's own signing key; secret."""

    @property
    def anchors(self) -> str:
        """Fingerprint of the federation's anchors: the one that `fedtune ca init` shows."""
        return fingerprint(self.ca + root_pem(self.root))

    def prove(self, request: bytes) -> tuple[bytes, bytes]:
        """Return the id of the code's key, and its signature of a request."""
        key = Ed25519PrivateKey.from_private_bytes(self.seed)
        return key_id(public_bytes(key)), sign(key, KIND, request)


@dataclass(frozen=True)
class Invitation:
    """What the issuer of a code keeps of it."""

    key: bytes
    """The code's public key, 32 bytes."""
    name: str
    org: str
    until: int
    """Seconds since 1970."""
    holder: str = ""
    """Digest (hex) of the keys that have used it; empty if none has."""

    def is_proof(self, request: bytes, signature: bytes) -> bool:
        """Return whether a request is signed with the code."""
        return verify(self.key, KIND, request, signature)


def holder_of(request: Request) -> str:
    """Return the digest of the two keys of a request."""
    return sha256(request.key + public_der(csr_key(request.csr))).hexdigest()


# ---- the code ----


def encode(code: Code) -> str:
    """Return an invitation as a line to paste."""
    anchors = [one.public_bytes(Encoding.DER) for one in x509.load_pem_x509_certificates(code.ca)]
    body = {
        "address": code.address,
        "server": code.server,
        "name": code.name,
        "org": code.org,
        "ca": [text(one) for one in anchors],
        "root": text(code.root),
        "seed": text(code.seed),
    }
    return codes.encode("invitation", canonical_json(body))


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def decode(data: bytes) -> Code:
    """Return the invitation in the content of a code.

    Raises:
        WireError: if it is none.
    """
    address, server, name, org, ca, root, seed = read_fields(
        parse_json(data, "invitation"),
        {"address": str, "server": str, "name": str, "org": str, "ca": list, "root": str, "seed": str},
        "invitation",
    )
    if not (NAME.fullmatch(name) and NAME.fullmatch(org) and ADDRESS.fullmatch(address) and ADDRESS.fullmatch(server)):
        raise WireError(
            f"invitation: expected an address and names; got {address[:100]!r}, {name[:50]!r}, {org[:50]!r}"
        )
    public, secret = decode_base64(root, "invitation: root"), decode_base64(seed, "invitation: seed")
    if len(public) != 32 or len(secret) != 32 or not 1 <= len(ca) <= 4 or not all(isinstance(one, str) for one in ca):
        raise WireError("invitation: expected a CA, and keys of 32 bytes; got others")
    try:
        pem = pem_of([decode_base64(one, "invitation: ca") for one in ca])
        is_anchor = are_trust_anchors(pem)
    except ValueError as error:
        raise WireError(f"invitation: expected the certificate of a CA; {error}") from None
    if not is_anchor:
        raise WireError("invitation: expected the certificate of a CA; got another")
    return Code(address, server, name, org, pem, public, secret)


@parse_errors_as_value_errors()
def pem_of(anchors: list[bytes]) -> bytes:
    return b"".join(x509.load_der_x509_certificate(one).public_bytes(Encoding.PEM) for one in anchors)


# ---- what its issuer keeps ----


def invite(
    folder: Path, *, address: str, server: str, name: str, org: str, ca: bytes, root: bytes, hours: int, now: int
) -> Code:
    """Make a code for one site, and keep what recognises it; earlier ones for the name end, used or not.

    Else two holders of codes for one name would take each other's place in the queue.

    Args:
        folder: of the enrolment service.
        address: HOST:PORT of the enrolment service, as the site dials it.
        server: likewise of the server that it joins afterwards.
        name: under which the site is to be enrolled.
        org: of the site.
        ca: PEM of the federation's CA.
        root: public key that signs its rosters.
        hours: for which the code can be used.
        now: seconds since 1970.

    Raises:
        ConfigError: if a name or the time is not allowed, or too many invitations are open.
    """
    faults = [
        Fault(f"--{key}", "letters, digits, '.', '_' and '-', at most 100, a letter or digit first", repr(value))
        for key, value in (("name", name), ("org", org))
        if not NAME.fullmatch(value)
    ]
    if not 1 <= hours <= MAX_HOURS:
        faults.append(Fault("--hours", f"1 to {MAX_HOURS}", str(hours)))
    if faults:
        raise ConfigError(faults)
    count = 0
    for path, known in list_all(folder):
        if now > known.until + KEEP_S or known.name == name:
            remove(path)
        else:
            count += not known.holder and now <= known.until
    if count >= MAX_OPEN:
        raise ConfigError(Fault("", f"at most {MAX_OPEN} open invitations", "one more", "wait until some have ended"))
    code = Code(address, server, name, org, ca, root, secrets.token_bytes(32))
    public = public_bytes(Ed25519PrivateKey.from_private_bytes(code.seed))
    store(folder, Invitation(public, name, org, now + hours * 3600))
    return code


def store(folder: Path, invitation: Invitation) -> None:
    """Write what is kept of a code, in one step."""
    body = {
        "key": invitation.key.hex(),
        "name": invitation.name,
        "org": invitation.org,
        "until": invitation.until,
        "holder": invitation.holder,
    }
    path = folder / FOLDER / f"{key_id(invitation.key).hex()}{SUFFIX}"
    write_bytes(path, json.dumps(body).encode() + b"\n", mode=0o600)


def claim(folder: Path, invitation: Invitation, holder: str) -> Invitation:
    """Bind a code to the keys that use it first, before anything is done with their request."""
    used = replace(invitation, holder=holder)
    if not invitation.holder:
        store(folder, used)
    return used


def find(folder: Path, identifier: bytes) -> Invitation | None:
    """Return the invitation whose key has this id; None if there is none, or its file is damaged."""
    if len(identifier) != 16:
        return None
    data = read_regular(folder / FOLDER / f"{identifier.hex()}{SUFFIX}", MAX_RECORD_BYTES)
    try:
        known = None if data is None else parse(parse_json(data, "invitation"))
    except WireError:
        return None
    return known if known is not None and key_id(known.key) == identifier else None


def list_all(folder: Path) -> Iterator[tuple[Path, Invitation]]:
    """Yield all invitations with their files."""
    for path in sorted((folder / FOLDER).glob(f"*{SUFFIX}")):
        try:
            identifier = bytes.fromhex(path.name.removesuffix(SUFFIX))
        except ValueError:
            continue
        if (known := find(folder, identifier)) is not None:
            yield path, known


def parse(body: Any) -> Invitation:
    """Return an invitation from the JSON of its file.

    Raises:
        WireError: if it is none.
    """
    key, name, org, until, holder = read_fields(
        body, {"key": str, "name": str, "org": str, "until": int, "holder": str}, "invitation"
    )
    try:
        public = bytes.fromhex(key)
    except ValueError:
        public = b""
    if len(public) != 32 or not NAME.fullmatch(name) or not NAME.fullmatch(org) or not 0 <= until <= LATEST:
        raise WireError("invitation: expected a key, names and a time; got others")
    return Invitation(public, name, org, until, holder)
