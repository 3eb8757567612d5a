"""Enrollment of a party: keys that never leave it, a request signed by both, and the bundle that the CA sends back."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fedtune.errors import ConfigError, Fault, WireError
from fedtune.link.pki import certificates, roster
from fedtune.link.pki.dsse import (
    canonical_json,
    decode_base64,
    is_signed_by,
    make_dsse,
    parse_dsse,
    parse_json,
    read_fields,
)
from fedtune.link.pki.identity import (
    CA,
    CERTIFICATE,
    ROOT,
    ROSTER,
    SIGN_KEY,
    TLS_KEY,
    Identity,
    load_identity,
    parse_root_key,
    read_required,
    read_root_key,
    read_secret,
)
from fedtune.link.pki.roster import NAME, Role
from fedtune.link.pki.signing import pae, public_bytes
from fedtune.store.files import store_errors, write_bytes

KIND = "application/vnd.fedtune.request.v1+json"
MAX_BUNDLE_BYTES = 8 * 2**20
MAX_HOSTS = 16
TLS_SIGNER = "tls"
"""Key id of a request's second signature, by the TLS key."""
HOST = re.compile(r"[A-Za-z0-9:](?:[A-Za-z0-9.:-]{0,251}[A-Za-z0-9:])?")
ROLES: tuple[Role, ...] = ("client", "coordinator", "auditor")


@dataclass(frozen=True)
class Request:
    """A party that asks to be enrolled, with its keys."""

    name: str
    org: str
    role: Role
    hosts: tuple[str, ...]
    """Names and addresses of a coordinator, which clients dial."""
    csr: bytes
    """Signing request for the TLS certificate (PEM)."""
    key: bytes
    """Ed25519 public key."""


def make_request(folder: Path, *, name: str, org: str, role: Role, hosts: Sequence[str] = ()) -> bytes:
    """Create the keys that the folder lacks, and return the request, signed by both.

    Raises:
        ConfigError: if a name, role or host is malformed, or a key in the folder cannot be used.
    """
    faults = [
        Fault(key, "letters, digits, '.', '_' and '-', at most 100, a letter or digit first", repr(value))
        for key, value in (("name", name), ("org", org))
        if not NAME.fullmatch(value)
    ]
    faults += [Fault("role", f"one of {', '.join(ROLES)}", repr(role))] if role not in ROLES else []
    faults += [Fault("host", "a host name or an address", repr(host)) for host in hosts if not HOST.fullmatch(host)]
    if len(hosts) > MAX_HOSTS:
        faults.append(Fault("host", f"at most {MAX_HOSTS} hosts", str(len(hosts))))
    if role == "coordinator" and not hosts:
        faults.append(Fault("host", "the names under which clients dial the server", "none", "give --host NAME"))
    if faults:
        raise ConfigError(faults)
    with store_errors(folder):
        # The mode of a folder with other contents stays: each key file has its own.
        if not folder.exists():
            folder.mkdir(parents=True, mode=0o700)
    # Keys that are here stay: a renewal asks for another certificate of the same keys.
    if not (folder / SIGN_KEY).exists():
        write_bytes(folder / SIGN_KEY, certificates.pem_of(Ed25519PrivateKey.generate()), mode=0o600)
    if not (folder / TLS_KEY).exists():
        write_bytes(folder / TLS_KEY, certificates.pem_of(certificates.new_tls_key()), mode=0o600)
    try:
        key, tls = (
            certificates.load_signing_key(read_secret(folder / SIGN_KEY)),
            certificates.load_tls_key(read_secret(folder / TLS_KEY)),
        )
    except ValueError as error:
        raise ConfigError(Fault("identity", f"keys in {folder} that can be used", str(error))) from None
    payload = canonical_json(
        {
            "name": name,
            "org": org,
            "role": role,
            "hosts": list(hosts),
            "csr": certificates.csr(tls, name).decode(),
            "key": base64.b64encode(public_bytes(key)).decode(),
        }
    )
    # Both keys sign: else a request could claim a key that its author does not hold.
    second = tls.sign(pae(KIND, payload), ec.ECDSA(hashes.SHA256()))
    return make_dsse(KIND, payload, key, {"keyid": TLS_SIGNER, "sig": base64.b64encode(second).decode()})


def read_request(data: bytes) -> Request:
    """Return a request that both of its keys have signed.

    Raises:
        WireError: if it is malformed, or a signature does not hold.
    """
    payload, signatures = parse_dsse(data, KIND, "request")
    name, org, role, hosts, csr, key = read_fields(
        parse_json(payload, "request"),
        {"name": str, "org": str, "role": str, "hosts": list, "csr": str, "key": str},
        "request",
    )
    public = decode_base64(key, "request: key")
    if len(signatures) != 2 or not is_signed_by(public, KIND, payload, signatures[0]) or signatures[1][0] != TLS_SIGNER:
        raise WireError("request: expected signatures by both of its keys; got none that holds")
    try:
        tls = certificates.csr_key(csr.encode())
        tls.verify(signatures[1][1], pae(KIND, payload), ec.ECDSA(hashes.SHA256()))
    except (ValueError, InvalidSignature) as error:
        raise WireError(f"request: expected signatures by both of its keys; {error or 'one does not hold'}") from None
    # Checked again, since it comes from outside: a "/" in a name would make another URI in the certificate.
    if not NAME.fullmatch(name) or not NAME.fullmatch(org) or role not in ROLES:
        raise WireError(f"request: expected names and a role; got {name[:100]!r}, {org[:100]!r}, {role[:20]!r}")
    if len(hosts) > MAX_HOSTS or not all(isinstance(host, str) and HOST.fullmatch(host) for host in hosts):
        raise WireError(f"request: expected at most {MAX_HOSTS} hosts; got others")
    return Request(name, org, role, tuple(hosts), csr.encode(), public)


def accept_bundle(folder: Path, bundle: bytes, *, now: int) -> Identity:
    """Install the bundle of the CA, checked against this folder's own keys and pinned anchors.

    Raises:
        WireError: if it is malformed.
        ConfigError: if it is for another key, or of another federation than the pinned one.
    """
    pem, ca, anchor, signed = unpack_bundle(bundle)
    key, tls = read_secret(folder / SIGN_KEY), read_secret(folder / TLS_KEY)
    try:
        federation, _, name = certificates.spiffe_parts(pem)
        is_own = certificates.matches_key(pem, certificates.load_tls_key(tls))
        # The whole bundle is verified before the first file is written.
        root, public = parse_root_key(anchor), public_bytes(certificates.load_signing_key(key))
        is_unchanged = (
            certificates.is_canonical(pem) and certificates.are_trust_anchors(ca) and anchor == root_pem(root)
        )
        new = roster.decode(signed, root)
        # A registrar's CA counts by what the root's roster says of it.
        others = new.delegation.ca if new.delegation is not None else b""
        is_issued = certificates.is_issued_by(pem, ca + others)
    except ValueError as error:
        raise WireError(f"bundle: expected certificates and keys; {error}") from None
    if not is_unchanged:
        raise WireError("bundle: expected certificates and keys as the CA wrote them; got changed ones; fetch it again")
    if not is_own:
        hint = "accept the one that was made from this folder's request"
        raise ConfigError(Fault("bundle", f"a certificate of the key in {folder}", f"one of another, {name!r}", hint))
    if not is_issued:
        raise ConfigError(Fault("bundle", "a certificate signed by the CA in it", "one of another CA"))
    # Pinned at the first enrollment: a bundle swapped on its way must not bring another CA.
    for path, data, what in ((folder / CA, ca, "CA"), (folder / ROOT, anchor, "roster key")):
        if path.exists() and path.read_bytes() != data:
            hint = f"if the federation has really changed its {what}, compare fingerprints by voice and remove {path}"
            raise ConfigError(Fault("bundle", f"the {what} that is pinned in {folder}", "another", hint))
    party = new.parties.get(name)
    # Without its own key in the roster no server would take what this site signs.
    if new.federation != federation or party is None or party.key != public:
        raise ConfigError(Fault("bundle", f"a roster of {federation} with {name} and this folder's key", "another"))
    current = roster.decode(read_required(folder / ROSTER), root) if (folder / ROSTER).exists() else None
    serial = certificates.serial_number(pem)
    if current is not None and current.version > new.version and serial in valid_serials(current, name, public):
        # Installed here before the bundle, and signed after it: parties that were enrolled since must stay.
        new, signed = current, read_required(folder / ROSTER)
    roster.check_successor(current, new, now=now)
    for name_of_file, data in ((CERTIFICATE, pem), (CA, ca), (ROOT, anchor), (ROSTER, signed)):
        write_bytes(folder / name_of_file, data)
    return load_identity(folder, role=party.role, now=now)


def valid_serials(current: roster.Roster, name: str, public: bytes) -> tuple[str, ...]:
    """Return the serial numbers that count of an active party with this key."""
    party = current.parties.get(name)
    if party is None or party.key != public or party.state != "active":
        return ()
    return (*party.serials, *(entry.serial for entry in party.renewed))


def root_pem(public: bytes) -> bytes:
    """Return the public key that signs rosters as PEM."""
    return Ed25519PublicKey.from_public_bytes(public).public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def pack_bundle(certificate: bytes, ca: bytes, root: bytes, signed: bytes) -> bytes:
    """Return the file that the CA sends to a site: certificates, a public key and the roster, none of it secret."""
    return bundle_json(
        {"certificate": certificate.decode(), "ca": ca.decode(), "root": root.decode(), "roster": signed.decode()}
    )


def unpack_bundle(data: bytes) -> tuple[bytes, bytes, bytes, bytes]:
    """Return certificate, CA, root key and roster of a bundle, not verified.

    Raises:
        WireError: if it is malformed.
    """
    # Before it is parsed: a JSON parser needs many times the memory of its text.
    if len(data) > MAX_BUNDLE_BYTES:
        raise WireError(f"bundle: expected at most {MAX_BUNDLE_BYTES} bytes; got more")
    body = parse_json(data, "bundle")
    texts = read_fields(body, {"certificate": str, "ca": str, "root": str, "roster": str}, "bundle")
    if not all(text.isascii() for text in texts) or data.removesuffix(b"\n") != bundle_json(body).removesuffix(b"\n"):
        raise WireError("bundle: expected the file as the CA wrote it; got another spelling; fetch it again")
    pem, ca, anchor, signed = (text.encode() for text in texts)
    return pem, ca, anchor, signed


def bundle_json(body: Mapping[str, str]) -> bytes:
    return json.dumps(body, sort_keys=True, indent=1).encode() + b"\n"


def read_received(path: Path, what: str, step: str) -> bytes:
    """Return a file that another party has sent; of one that is too large, only enough to be rejected.

    Raises:
        ConfigError: if it cannot be read, naming the command that writes such a file.
    """
    try:
        with path.open("rb") as file:
            return file.read(MAX_BUNDLE_BYTES + 1)
    except OSError as error:
        raise ConfigError(Fault("", f"{what} at {path}", str(error.strerror), f"it is made by {step}")) from None


def install_roster(folder: Path, data: bytes, *, now: int) -> roster.Roster:
    """Replace the roster of an identity folder by a newer one; a running process of it reads that within a second.

    Raises:
        WireError: if it is not signed by the pinned key, or not newer.
        ConfigError: if the folder has no identity.
    """
    root = read_root_key(folder / ROOT)
    current = roster.decode(read_required(folder / ROSTER), root)
    new = roster.check_successor(current, roster.decode(data, root), now=now)
    write_bytes(folder / ROSTER, data)
    return new
