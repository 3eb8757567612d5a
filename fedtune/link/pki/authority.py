"""The certificate authority of a federation: a folder of keys, offline, that sign certificates and the roster."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import ConfigError, Fault
from fedtune.link.pki import certificates, roster
from fedtune.link.pki.delegation import STRIDE, Delegation
from fedtune.link.pki.enrollment import Request, pack_bundle, read_request, root_pem
from fedtune.link.pki.identity import parse_root_key, read_secret
from fedtune.link.pki.roster import NAME, Party, Roster
from fedtune.link.pki.signing import public_bytes
from fedtune.store.files import store_errors, write_bytes
from fedtune.store.lock import lock_run

CA_KEY, CA, ROSTER_KEY, ROSTER_PUB, ROSTER = "ca.key", "ca.crt", "roster.key", "roster.pub", "roster"
# The longest time for which a server that gets no newer roster still takes a party that was revoked.
ROSTER_DAYS = 30
DAY_S = 86_400
MAX_SERIALS = 2
"""Certificates of a party that count at the same time: the renewed one, and the one before until it is installed."""


def create_authority(folder: Path, federation: str, *, now: int, years: int = 10) -> Roster:
    """Create a CA, the key that signs the roster, and a roster without parties.

    Raises:
        ConfigError: if the name has other characters, or the folder is not empty.
    """
    if not NAME.fullmatch(federation):
        raise ConfigError(Fault("federation", "letters, digits, '.', '_', '-', at most 100", repr(federation)))
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(Fault("", "a new or an empty folder", str(folder), "keep each federation's CA in its own"))
    key, root = certificates.new_tls_key(), Ed25519PrivateKey.generate()
    with store_errors(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Before the first key is written: else other users could read it for a moment.
        folder.chmod(0o700)
    write_bytes(folder / CA_KEY, certificates.pem_of(key), mode=0o600)
    write_bytes(folder / ROSTER_KEY, certificates.pem_of(root), mode=0o600)
    write_bytes(folder / CA, certificates.ca_certificate(federation, key, years=years, now=now))
    write_bytes(folder / ROSTER_PUB, root_pem(public_bytes(root)))
    first = Roster(federation, 1, now + ROSTER_DAYS * DAY_S, {})
    write_bytes(folder / ROSTER, roster.encode(first, root))
    return first


def current_roster(folder: Path) -> Roster:
    """Return the roster that a CA has signed last.

    Raises:
        ConfigError: if the folder is no CA.
        WireError: if the roster is not signed by the folder's own key.
    """
    with key_errors(folder):
        root = parse_root_key(read_ca_file(folder / ROSTER_PUB))
    # Verified although the folder is our own: a change made to the file would be signed with the next version.
    return roster.decode(read_ca_file(folder / ROSTER), root)


def sign_request(folder: Path, request: bytes, *, days: int = 90, replace: bool = False, now: int) -> bytes:
    """Enrol a party, or give one a new certificate, and return the bundle for its site.

    Args:
        folder: of the CA.
        request: as `enrollment.make_request` returned it.
        days: life of the certificate.
        replace: whether a known party may have another signing key, organisation or role, or come back after it was
            revoked; its old key and certificates end.
        now: seconds since 1970.

    Raises:
        WireError: if the request is malformed or its signatures do not hold.
        ConfigError: if it must not be signed, with the reason.
        StoreError: if another process changes this CA now.
    """
    applicant = read_request(request)
    with changing(folder):
        return sign_applicant(folder, applicant, days=days, replace=replace, now=now)


def sign_applicant(folder: Path, applicant: Request, *, days: int, replace: bool, now: int) -> bytes:
    """Enrol a party whose request has been verified; see `sign_request`."""
    before = current_roster(folder)
    old = before.parties.get(applicant.name)
    if old is not None and not replace and (problem := renewal_fault(old, applicant)):
        raise ConfigError(problem)
    same_key = [party for party in before.parties.values() if party.key == applicant.key]
    twin = next((party for party in same_key if party.name != applicant.name), None)
    # Also a revoked one: it must not come back under another name.
    if twin is not None:
        hint = "request it from a new identity folder, with keys of its own"
        raise ConfigError(Fault("request", f"a key of {applicant.name} alone", f"the one of {twin.name}", hint))
    if applicant.role == "coordinator" and not applicant.hosts:
        raise ConfigError(Fault("request", "hosts that clients dial", "none", "request with --host NAME"))
    ca = read_ca_file(folder / CA)
    with key_errors(folder):
        ca_key = certificates.load_tls_key(read_secret(folder / CA_KEY))
    try:
        pem = certificates.issue_certificate(
            certificates.csr_key(applicant.csr),
            f"{certificates.SCHEME}{before.federation}/{applicant.org}/{applicant.name}",
            hosts=applicant.hosts,
            server=applicant.role == "coordinator",
            days=days,
            ca=ca,
            ca_key=ca_key,
            now=now,
        )
    except ValueError as error:
        raise ConfigError(Fault("days", "a certificate that may be signed", str(error))) from None
    # Without `replace` the old certificate, whose key has just been compared, counts until the new one is installed.
    serials = old.serials if old is not None and not replace else ()
    begin, end = certificates.validity(pem)
    serials = (*serials, certificates.serial_number(pem))[-MAX_SERIALS:]
    # A further certificate of a known key: what it signed before then still holds.
    since = min(begin, old.not_before) if old is not None and not replace else begin
    party = Party(applicant.name, applicant.org, applicant.role, applicant.key, serials, since, end)
    changed = dataclasses.replace(before, parties={**before.parties, applicant.name: party})
    signed = sign_next_version(folder, changed, now=now)
    return pack_bundle(pem, ca, read_ca_file(folder / ROSTER_PUB), signed)


def renewal_fault(old: Party, applicant: Request) -> Fault | None:
    """Return why a request is more than a further certificate for a known party; None if it is not."""
    if old.key != applicant.key:
        hint = "compare the fingerprint by voice, then sign with --replace"
        return Fault("request", f"the key that {applicant.name} is enrolled with", "another", hint)
    if old.state == "revoked":
        return Fault("request", "a party that is not revoked", applicant.name, "sign with --replace to readmit it")
    if (old.org, old.role) != (applicant.org, applicant.role):
        expected, got = f"{applicant.name} as {old.role} of {old.org}", f"as {applicant.role} of {applicant.org}"
        return Fault("request", expected, got, "sign with --replace if it has really changed")
    return None


def revoke(folder: Path, name: str, *, now: int) -> Roster:
    """Revoke a party: its certificates and signatures do not count any more where the new roster is installed.

    Raises:
        ConfigError: if there is no such party.
    """
    with changing(folder):
        before = current_roster(folder)
        if name not in before.parties:
            known: Sequence[str] = sorted(before.parties)
            raise ConfigError(Fault("name", f"a party ({', '.join(known) or 'there is none yet'})", repr(name)))
        # Revoked, and not removed: its key must not come back under another name.
        revoked = dataclasses.replace(before.parties[name], state="revoked", serials=())
        sign_next_version(folder, dataclasses.replace(before, parties={**before.parties, name: revoked}), now=now)
        return current_roster(folder)


def renew(folder: Path, *, days: int = ROSTER_DAYS, now: int) -> Roster:
    """Sign the roster again, valid for so many days from now."""
    with changing(folder):
        sign_next_version(folder, current_roster(folder), days=days, now=now)
        return current_roster(folder)


@contextmanager
def changing(folder: Path) -> Iterator[None]:
    """Keep others from changing a CA meanwhile: two rosters of one version would differ, and be refused.

    Raises:
        ConfigError: if the folder is no CA.
        StoreError: if another process changes it now.
    """
    read_ca_file(folder / ROSTER)
    with lock_run(folder):
        yield


def delegate(folder: Path, delegation: Delegation | None, *, now: int) -> Roster:
    """Let a registrar renew the certificates of clients and the roster itself; None: no registrar any more."""
    with changing(folder):
        sign_next_version(folder, dataclasses.replace(current_roster(folder), delegation=delegation), now=now)
        return current_roster(folder)


def sign_next_version(folder: Path, changed: Roster, *, days: int = ROSTER_DAYS, now: int) -> bytes:
    """Sign a roster under the next version number, write it, and return it."""
    # Never earlier than before: a new party must not shorten the time in which the roster is valid.
    until = max(changed.valid_until, now + days * DAY_S)
    # Above every version that a registrar may have given to the roster before.
    is_delegated = changed.delegation is not None or current_roster(folder).delegation is not None
    version = (changed.version // STRIDE + 1) * STRIDE if is_delegated else changed.version + 1
    following = dataclasses.replace(changed, version=version, valid_until=until)
    with key_errors(folder):
        key = certificates.load_signing_key(read_secret(folder / ROSTER_KEY))
    data = roster.encode(following, key)
    write_bytes(folder / ROSTER, data)
    return data


@contextmanager
def key_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(Fault("ca", f"keys in {folder} that can be used", str(error), "put back a copy")) from None


def read_ca_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        hint = "make it with fedtune ca init, or name it with --ca"
        raise ConfigError(Fault("ca", f"a file {path} of a CA", str(error.strerror), hint)) from None
