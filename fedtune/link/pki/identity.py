"""Who a party is: its folder of keys and certificate, and the federation's anchors that it has pinned."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from fedtune.errors import ConfigError, Fault, WireError
from fedtune.link.pki import certificates
from fedtune.link.pki.roster import MAX_BYTES, decode
from fedtune.link.pki.signing import raw

SIGN_KEY, TLS_KEY, CERTIFICATE, CA, ROOT, ROSTER = "sign.key", "tls.key", "tls.crt", "ca.crt", "root.pub", "roster"
AGAIN = "enrol again: fedtune enroll request, sign, accept"


@dataclass(frozen=True)
class Identity:
    """A party of a federation, with its secrets."""

    folder: Path
    name: str
    org: str
    role: str
    federation: str
    key: Ed25519PrivateKey = field(repr=False)
    """Signs what it says."""
    public: bytes
    tls_key: bytes = field(repr=False)
    """PEM."""
    certificate: bytes
    """PEM."""
    ca: bytes
    """PEM of the CA, or CAs, whose certificates it takes."""
    root: bytes
    """Public key that signs rosters, 32 bytes."""
    serial: str
    not_before: int
    """Seconds since 1970."""
    not_after: int


def load(folder: Path, *, role: str, now: int) -> Identity:
    """Return the identity in a folder, after everything that can be checked without a network has been.

    Raises:
        ConfigError: naming what is missing or does not fit, and what to do.
    """
    if not folder.is_dir():
        raise fault("a folder made by fedtune enroll request", f"none at {folder}", "start there, or set identity")
    sign_pem, tls_pem = secret(folder / SIGN_KEY), secret(folder / TLS_KEY)
    pem, ca, anchor = (read_required(folder / name) for name in (CERTIFICATE, CA, ROOT))
    try:
        key, tls = certificates.signing_key(sign_pem), certificates.tls_key(tls_pem)
        federation, org, name = certificates.spiffe(pem)
        not_before, not_after = certificates.validity(pem)
        root, issued, own = root_key(anchor), certificates.is_issued_by(pem, ca), certificates.belongs(pem, tls)
    except ValueError as error:
        raise fault(f"keys and certificates in {folder} that can be read", str(error), AGAIN) from None
    if not own:
        raise fault(f"a certificate of the key {folder / TLS_KEY}", "one of another key", AGAIN)
    if not issued:
        raise fault(f"a certificate signed by {folder / CA}", "one of another CA", AGAIN)
    if now > not_after:
        raise fault("a certificate that is valid", f"one that ended on {day(not_after)}", AGAIN)
    if now < not_before:
        raise fault("a certificate that is valid", f"one that begins on {day(not_before)}", "check this clock")
    try:
        roster = decode(read_required(folder / ROSTER), root)
    except WireError as error:
        hint = "fedtune roster install FILE, with the file from the coordinator"
        raise fault(f"a roster of this federation in {folder}", str(error), hint) from None
    entry = roster.members.get(name)
    if entry is None or entry.key != raw(key):
        raise fault(f"{name} in the roster (version {roster.version}) with this key", "none, or another key", AGAIN)
    if entry.role != role:
        raise fault(f"a {role}", f"{name}, who is enrolled as {entry.role}", f"enrol with --role {role}")
    return Identity(
        folder, name, org, role, federation, key, raw(key), tls_pem, pem, ca, root, certificates.serial(pem),
        not_before, not_after,
    )  # fmt: skip


def renewal(identity: Identity, now: int) -> str:
    """Return a warning from two thirds of the certificate's life on; empty before."""
    if now < identity.not_before + (identity.not_after - identity.not_before) * 2 // 3:
        return ""
    return f"the certificate of {identity.name} ends on {day(identity.not_after)}; {AGAIN}"


@certificates.parsing()
def root_key(pem: bytes) -> bytes:
    """Return the public key of a PEM, 32 bytes.

    Raises:
        ValueError: if it is not one of Ed25519.
    """
    key = load_pem_public_key(pem)
    if not isinstance(key, Ed25519PublicKey):
        raise ValueError("not a public key of Ed25519")
    return key.public_bytes_raw()


def read_root_key(path: Path) -> bytes:
    """Return the key in a file that rosters are held against.

    Raises:
        ConfigError: if there is none.
    """
    try:
        return root_key(read_required(path))
    except ValueError as error:
        raise fault(f"a public key of Ed25519 in {path}", str(error), "put back the one that was there") from None


def secret(path: Path) -> bytes:
    """Return the content of a private key's file, which only its owner may read.

    Raises:
        ConfigError: if others may, or it is missing.
    """
    data = read_required(path)
    if path.stat().st_mode & 0o077:
        raise fault(
            f"a private key that its owner alone can read at {path}", "one that others can read", "chmod 600 it"
        )
    return data


def read_required(path: Path) -> bytes:
    step = "fedtune enroll request" if path.suffix == ".key" else "fedtune enroll accept BUNDLE"
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise fault(f"a file {path}", "none", f"it is made by {step}") from None
    except OSError as error:
        raise fault(f"a file {path} that can be read", str(error.strerror), "check its owner and mode") from None


def fault(expected: str, got: str, hint: str) -> ConfigError:
    return ConfigError(Fault("link.identity", expected, got, hint))


def day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
