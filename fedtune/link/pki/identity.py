"""The identity of a party: a folder with its keys and certificate, and the anchors of its federation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedtune.errors import ConfigError, Fault, TemporaryError, WireError
from fedtune.link.pki import certificates
from fedtune.link.pki.dsse import MAX_BYTES
from fedtune.link.pki.roster import SKEW_S, Roster, decode
from fedtune.link.pki.signing import public_bytes

SIGN_KEY, TLS_KEY, CERTIFICATE, CA, ROOT, ROSTER = "sign.key", "tls.key", "tls.crt", "ca.crt", "root.pub", "roster"
ENROL_AGAIN = "enrol again: fedtune enroll request, sign, accept"
RENEW = "its request waits at the coordinator until the CA signs, if both are connected; or enrol again by files"

RENEW_ROSTER = "the CA renews it (fedtune roster renew), and the coordinator installs it; sites take it from there"
WEEK_S = 7 * 24 * 3600


@dataclass(frozen=True)
class Identity:
    """The keys of a party, with what it needs to verify others."""

    folder: Path
    name: str
    org: str
    role: str
    federation: str
    # Not in the repr: a traceback or a log would show the private key.
    key: Ed25519PrivateKey = field(repr=False)
    """Signs its statements."""
    public: bytes
    tls_key: bytes = field(repr=False)
    """PEM."""
    certificate: bytes
    """PEM."""
    ca: bytes
    """PEM of the CA, or of several CAs, whose certificates it trusts."""
    root: bytes
    """Public key that signs rosters, 32 bytes."""
    serial: str
    not_before: int
    """Seconds since 1970."""
    not_after: int


def load_identity(folder: Path, *, role: str, now: int) -> Identity:
    """Return the identity in a folder, after every check that needs no network.

    Raises:
        ConfigError: naming what is missing or does not fit, and what to do.
    """
    if not folder.is_dir():
        raise identity_error(
            "a folder made by fedtune enroll request",
            f"none at {folder}",
            "start there, or give the file that sets identity",
        )
    sign_pem, tls_pem = read_secret(folder / SIGN_KEY), read_secret(folder / TLS_KEY)
    pem, ca, anchor = (read_required(folder / name) for name in (CERTIFICATE, CA, ROOT))
    try:
        key, tls = certificates.load_signing_key(sign_pem), certificates.load_tls_key(tls_pem)
        federation, org, name = certificates.spiffe_parts(pem)
        not_before, not_after = certificates.validity(pem)
        root, is_own = parse_root_key(anchor), certificates.matches_key(pem, tls)
        is_issued = certificates.is_issued_by(pem, ca + registrar_ca(folder, root))
    except ValueError as error:
        raise identity_error(f"keys and certificates in {folder} that can be read", str(error), ENROL_AGAIN) from None
    # A handshake would fail for the same reasons, but gRPC does not say for which of them.
    if not is_own:
        raise identity_error(f"a certificate of the key {folder / TLS_KEY}", "one of another key", ENROL_AGAIN)
    if not is_issued:
        raise identity_error(f"a certificate signed by {folder / CA}", "one of another CA", ENROL_AGAIN)
    if now > not_after:
        hint = f"{ENROL_AGAIN}; or check this clock ({format_time(now)})"
        raise identity_error("a certificate that is valid", f"one that ended on {format_time(not_after)}", hint)
    if now < not_before - SKEW_S:
        got, hint = f"one that begins on {format_time(not_before)}", f"check this clock ({format_time(now)})"
        # Boards without a battery for their clock start in 1970, and are right as soon as the network is there.
        raise TemporaryError(Fault("link.identity", "a certificate that is valid", got, hint))
    try:
        roster = decode(read_required(folder / ROSTER), root)
    except WireError as error:
        hint = "fedtune roster install FILE, with the file from the coordinator"
        raise identity_error(f"a roster of this federation in {folder}", str(error), hint) from None
    # The roster, and not the certificate, says which key signs for a party.
    party = roster.parties.get(name)
    if party is None or party.key != public_bytes(key):
        raise identity_error(
            f"{name} in the roster (version {roster.version}) with this key", "none, or another key", ENROL_AGAIN
        )
    if party.role != role:
        raise identity_error(f"a {role}", f"{name}, who is enrolled as {party.role}", f"enrol with --role {role}")
    return Identity(
        folder, name, org, role, federation, key, public_bytes(key), tls_pem, pem, ca, root,
        certificates.serial_number(pem), not_before, not_after,
    )  # fmt: skip


def registrar_ca(folder: Path, root: bytes) -> bytes:
    """Return the CA (PEM) of the registrar in a folder's roster; nothing where there is none, or no roster yet."""
    try:
        delegation = decode((folder / ROSTER).read_bytes(), root).delegation
    except (OSError, WireError):
        return b""
    return delegation.ca if delegation is not None else b""


def certificate_warning(name: str, not_before: int, not_after: int, *, now: float) -> str:
    """Return a warning from two thirds of a certificate's life on; empty before."""
    if now < not_before + (not_after - not_before) * 2 // 3:
        return ""
    ends = "ends" if now <= not_after else "ended"
    return f"the certificate of {name} {ends} on {format_time(not_after)}; {RENEW}"


def roster_warning(version: int, valid_until: int, *, now: float) -> str:
    """Return a warning in the last week of a roster; empty before."""
    if now < valid_until - WEEK_S:
        return ""
    ends = "ends" if now <= valid_until else "ended"
    return f"the roster (version {version}) {ends} on {format_time(valid_until)}; {RENEW_ROSTER}"


def current_dates(identity: Identity) -> tuple[int, int]:
    """Return from when to when the certificate in a party's folder is valid: it may have been renewed there."""
    try:
        return certificates.validity((identity.folder / CERTIFICATE).read_bytes())
    except (OSError, ValueError):  # while it is being replaced
        return identity.not_before, identity.not_after


def renewed_identity(identity: Identity) -> Identity | None:
    """Return a party's identity with the newer certificate of its keys that lies in its folder; None without one."""
    try:
        pem = (identity.folder / CERTIFICATE).read_bytes()
        if pem == identity.certificate or not certificates.matches_key(
            pem, certificates.load_tls_key(identity.tls_key)
        ):
            return None
        serial, dates = certificates.serial_number(pem), certificates.validity(pem)
    except (OSError, ValueError):  # while it is being replaced
        return None
    return replace(identity, certificate=pem, serial=serial, not_before=dates[0], not_after=dates[1])


def expiry_warnings(identity: Identity, roster: Roster, *, now: float) -> Sequence[str]:
    """Return a sentence for each of certificate and roster of a party that ends soon."""
    texts = (
        certificate_warning(identity.name, *current_dates(identity), now=now),
        roster_warning(roster.version, roster.valid_until, now=now),
    )
    return [text for text in texts if text]


@certificates.parse_errors_as_value_errors()
def parse_root_key(pem: bytes) -> bytes:
    """Return the public key of a PEM, 32 bytes.

    Raises:
        ValueError: if it is not one of Ed25519.
    """
    key = load_pem_public_key(pem)
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("not a public key of Ed25519")
    return key.public_bytes_raw()


def read_root_key(path: Path) -> bytes:
    """Return the public key in a file, which verifies rosters.

    Raises:
        ConfigError: if it cannot be read.
    """
    try:
        return parse_root_key(read_required(path))
    except ValueError as error:
        raise identity_error(
            f"a public key of Ed25519 in {path}", str(error), "put back the one that was there"
        ) from None


def read_secret(path: Path) -> bytes:
    """Return the content of a private key's file, which only its owner may read.

    Raises:
        ConfigError: if other users may read it, or it is missing.
    """
    data = read_required(path)
    # Another user of the machine could sign updates in this site's name.
    if path.stat().st_mode & 0o077:
        raise identity_error(
            f"a private key that its owner alone can read at {path}", "one that others can read", "chmod 600 it"
        )
    return data


def read_required(path: Path) -> bytes:
    step = "fedtune enroll request" if path.suffix == ".key" else "fedtune enroll accept BUNDLE"
    try:
        with path.open("rb") as file:
            # Bounded: one byte more than any valid file is enough to reject it.
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise identity_error(f"a file {path}", "none", f"it is made by {step}") from None
    except OSError as error:
        raise identity_error(
            f"a file {path} that can be read", str(error.strerror), "check its owner and mode"
        ) from None


def identity_error(expected: str, got: str, hint: str) -> ConfigError:
    return ConfigError(Fault("link.identity", expected, got, hint))


def format_time(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
