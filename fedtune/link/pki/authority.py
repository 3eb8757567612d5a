"""The certificate authority of a federation, a folder on an offline machine: it signs requests and the roster."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import ConfigError, Fault
from fedtune.link.pki import certificates, roster
from fedtune.link.pki.enrollment import Request, pack_bundle, read_request, root_pem
from fedtune.link.pki.identity import root_key, secret
from fedtune.link.pki.roster import NAME, Party, Roster
from fedtune.link.pki.signing import raw
from fedtune.store.files import store_errors, write_bytes

CA_KEY, CA, ROSTER_KEY, ROSTER_PUB, ROSTER = "ca.key", "ca.crt", "roster.key", "roster.pub", "roster"
ROSTER_DAYS = 30
DAY_S = 86_400
KEPT_SERIALS = 2


def init(folder: Path, federation: str, *, now: int, years: int = 10) -> Roster:
    """Make a CA, the key of the roster, and a roster without members.

    Raises:
        ConfigError: if the name is none, or the folder holds something.
    """
    if not NAME.fullmatch(federation):
        raise ConfigError(Fault("federation", "letters, digits, '.', '_', '-', at most 100", repr(federation)))
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(Fault("", "a new or an empty folder", str(folder), "keep each federation's CA in its own"))
    key, root = certificates.new_tls_key(), Ed25519PrivateKey.generate()
    with store_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
    write_bytes(folder / CA_KEY, certificates.pem_of(key), mode=0o600)
    write_bytes(folder / ROSTER_KEY, certificates.pem_of(root), mode=0o600)
    write_bytes(folder / CA, certificates.authority(federation, key, years=years, now=now))
    write_bytes(folder / ROSTER_PUB, root_pem(raw(root)))
    made = Roster(federation, 1, now + ROSTER_DAYS * DAY_S, {})
    write_bytes(folder / ROSTER, roster.encode(made, root))
    return made


def current_roster(folder: Path) -> Roster:
    """Return the roster of a CA as it last signed it.

    Raises:
        ConfigError: if the folder is no CA.
        WireError: if the roster is not signed by the folder's own key.
    """
    with keys_of(folder):
        root = root_key(read(folder / ROSTER_PUB))
    return roster.decode(read(folder / ROSTER), root)


def sign_request(folder: Path, request: bytes, *, days: int = 90, replace: bool = False, now: int) -> bytes:
    """Enrol a party, or give one a new certificate, and return the bundle for its site.

    Args:
        folder: of the CA.
        request: what `enrol.request` made.
        days: how long the certificate lasts.
        replace: whether a party of that name may come with another signing key, organisation or role, or after it was
            revoked; its old key and certificates end.
        now: seconds since 1970.

    Raises:
        WireError: if the request is malformed or its signatures do not hold.
        ConfigError: if it must not be signed, with the reason.
    """
    asked = read_request(request)
    before = current_roster(folder)
    old = before.members.get(asked.name)
    if old is not None and not replace and (problem := misfit(old, asked)):
        raise ConfigError(problem)
    twin = next((one for one in before.members.values() if one.key == asked.key and one.name != asked.name), None)
    if twin is not None:  # revoked or not: who was taken out must not come back under another name
        hint = "request it from a new identity folder, with keys of its own"
        raise ConfigError(Fault("request", f"a key of {asked.name} alone", f"the one of {twin.name}", hint))
    if asked.role == "coordinator" and not asked.hosts:
        raise ConfigError(Fault("request", "hosts that clients dial", "none", "request with --host NAME"))
    ca = read(folder / CA)
    with keys_of(folder):
        ca_key = certificates.tls_key(secret(folder / CA_KEY))
    try:
        pem = certificates.certificate(
            certificates.csr_key(asked.csr),
            f"{certificates.SCHEME}{before.federation}/{asked.org}/{asked.name}",
            hosts=asked.hosts,
            server=asked.role == "coordinator",
            days=days,
            ca=ca,
            ca_key=ca_key,
            now=now,
        )
    except ValueError as error:
        raise ConfigError(Fault("days", "a certificate that may be signed", str(error))) from None
    kept = old.serials if old is not None and not replace else ()  # without replace it fits, as found above
    begin, end = certificates.validity(pem)
    member = Party(
        asked.name, asked.org, asked.role, asked.key, (*kept, certificates.serial(pem))[-KEPT_SERIALS:], begin, end
    )
    made = resign(folder, dataclasses.replace(before, members={**before.members, asked.name: member}), now=now)
    return pack_bundle(pem, ca, read(folder / ROSTER_PUB), made)


def misfit(old: Party, asked: Request) -> Fault | None:
    """Return why a request is not simply a further certificate for a member."""
    if old.key != asked.key:
        hint = "compare the fingerprint by voice, then sign with --replace"
        return Fault("request", f"the key that {asked.name} is enrolled with", "another", hint)
    if old.state == "revoked":
        return Fault("request", "a party that is not revoked", asked.name, "sign with --replace to readmit it")
    if (old.org, old.role) != (asked.org, asked.role):
        expected, got = f"{asked.name} as {old.role} of {old.org}", f"as {asked.role} of {asked.org}"
        return Fault("request", expected, got, "sign with --replace if it has really changed")
    return None


def revoke(folder: Path, name: str, *, now: int) -> Roster:
    """Take a party out: its certificate and signatures count no more wherever the new roster is.

    Raises:
        ConfigError: if there is no such party.
    """
    before = current_roster(folder)
    if name not in before.members:
        known: Sequence[str] = sorted(before.members)
        raise ConfigError(Fault("name", f"a member ({', '.join(known) or 'there is none yet'})", repr(name)))
    gone = dataclasses.replace(before.members[name], state="revoked", serials=())
    resign(folder, dataclasses.replace(before, members={**before.members, name: gone}), now=now)
    return current_roster(folder)


def renew(folder: Path, *, days: int = ROSTER_DAYS, now: int) -> Roster:
    """Sign the roster again, for so many days from now."""
    resign(folder, current_roster(folder), days=days, now=now)
    return current_roster(folder)


def resign(folder: Path, changed: Roster, *, days: int = ROSTER_DAYS, now: int) -> bytes:
    """Sign a roster under the next version number, write it, and return it."""
    until = max(changed.valid_until, now + days * DAY_S)
    made = dataclasses.replace(changed, version=changed.version + 1, valid_until=until)
    with keys_of(folder):
        key = certificates.signing_key(secret(folder / ROSTER_KEY))
    data = roster.encode(made, key)
    write_bytes(folder / ROSTER, data)
    return data


@contextmanager
def keys_of(folder: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as error:
        raise ConfigError(Fault("ca", f"keys in {folder} that can be used", str(error), "put back a copy")) from None


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        hint = "make it with fedtune ca init, or name it with --ca"
        raise ConfigError(Fault("ca", f"a file {path} of a CA", str(error.strerror), hint)) from None
