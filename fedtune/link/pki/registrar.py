"""The registrar of a coordinator: an online key that renews the certificates of clients while the CA stays offline."""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import ConfigError, Fault, WireError
from fedtune.link.pki import certificates, enrollment, roster
from fedtune.link.pki.delegation import (
    MAX_DAYS,
    START,
    STRIDE,
    Delegation,
    Renewals,
    Renewed,
    decode_renewals,
    encode_renewals,
    newest_first,
    read_statement,
    split_file,
)
from fedtune.link.pki.dsse import (
    canonical_json,
    decode_base64,
    is_signed_by,
    make_dsse,
    parse_dsse,
    parse_json,
    read_fields,
)
from fedtune.link.pki.identity import CA, ROOT, ROSTER, Identity, read_required, read_root_key, read_secret
from fedtune.link.pki.roster import MAX_RENEWED, Roster, find_party
from fedtune.link.pki.signing import key_id, public_bytes, sign
from fedtune.store.files import write_bytes
from fedtune.store.lock import lock_run

SIGN_KEY, CA_KEY, OWN_CA = "registrar.key", "registrar-ca.key", "registrar-ca.crt"
"""In the identity folder of the coordinator."""
KIND = "application/vnd.fedtune.delegation.v1+json"
DAY_S = 86_400
CERTIFICATE_DAYS = 14
ROSTER_DAYS, EXTEND_DAYS = 14, 10
"""The roster is extended to so many days from now, once less than that many are left."""
WARN_DAYS = 7
LAST_DAYS = 3
"""Of a delegation, in which requests go to the CA's queue instead: certificates would end with it."""
OWN_YEARS = 2


@dataclass(frozen=True)
class Registrar:
    """The keys of a registrar whose delegation stands in the roster."""

    key: Ed25519PrivateKey = field(repr=False)
    ca_key: ec.EllipticCurvePrivateKey = field(repr=False)
    delegation: Delegation


# ---- the delegation ----


def ask(identity: Identity, *, now: int) -> bytes:
    """Create the keys of a registrar in a coordinator's folder, and return the request that the CA's operator signs.

    Raises:
        ConfigError: if a key there cannot be used.
    """
    folder = identity.folder
    if not (folder / SIGN_KEY).exists():
        write_bytes(folder / SIGN_KEY, certificates.pem_of(Ed25519PrivateKey.generate()), mode=0o600)
    if not (folder / OWN_CA).exists():
        ca_key = certificates.new_tls_key()
        write_bytes(folder / CA_KEY, certificates.pem_of(ca_key), mode=0o600)
        # Named otherwise than the CA of the federation: which of two issuers of one name signed is not clear.
        own = certificates.ca_certificate(f"{identity.federation} registrar", ca_key, years=OWN_YEARS, now=now)
        write_bytes(folder / OWN_CA, own)
    key, _, ca = load_keys(folder)
    payload = canonical_json(
        {
            "federation": identity.federation,
            "name": identity.name,
            "key": base64.b64encode(public_bytes(key)).decode(),
            "ca": ca.decode(),
        }
    )
    second = {"keyid": key_id(public_bytes(key)).hex(), "sig": base64.b64encode(sign(key, KIND, payload)).decode()}
    return make_dsse(KIND, payload, identity.key, second)


def read_ask(data: bytes, current: Roster, *, days: int, now: int) -> tuple[str, Delegation]:
    """Return the name of the coordinator that asks for a registrar, and the delegation that it asks for.

    Raises:
        WireError: if it is malformed, or not signed by an active coordinator of the roster and the registrar's key.
        ConfigError: if it may not last so long.
    """
    if not 1 <= days <= MAX_DAYS:
        raise ConfigError(Fault("--days", f"1 to {MAX_DAYS}", str(days)))
    payload, signatures = parse_dsse(data, KIND, "registrar")
    federation, name, text, ca = read_fields(
        parse_json(payload, "registrar"), {"federation": str, "name": str, "key": str, "ca": str}, "registrar"
    )
    public = decode_base64(text, "registrar: key")
    coordinator = find_party(current, bytes.fromhex(signatures[0][0])) if is_hex(signatures[0][0]) else None
    if coordinator is None or coordinator.role != "coordinator" or coordinator.name != name:
        raise WireError("registrar: expected a request signed by an active coordinator of the roster; got another")
    if (
        federation != current.federation
        or len(signatures) != 2
        or any(
            not is_signed_by(signer, KIND, payload, signature)
            for signer, signature in zip((coordinator.key, public), signatures, strict=True)
        )
    ):
        raise WireError("registrar: expected signatures by the coordinator and the registrar; got none that holds")
    try:
        is_anchor = certificates.are_trust_anchors(ca.encode())
    except ValueError:
        is_anchor = False
    if not is_anchor:
        raise WireError("registrar: expected the certificate of its CA; got another")
    return name, Delegation(public, ca.encode(), now + days * DAY_S)


def is_hex(text: str) -> bool:
    try:
        bytes.fromhex(text)
    except ValueError:
        return False
    return True


# ---- its keys ----


def load_keys(folder: Path) -> tuple[Ed25519PrivateKey, ec.EllipticCurvePrivateKey, bytes]:
    """Return signing key, CA key and CA of the registrar in a coordinator's folder.

    Raises:
        ConfigError: if one is missing, can be read by others, or cannot be used.
    """
    try:
        return (
            certificates.load_signing_key(read_secret(folder / SIGN_KEY)),
            certificates.load_tls_key(read_secret(folder / CA_KEY)),
            read_required(folder / OWN_CA),
        )
    except ValueError as error:
        raise ConfigError(Fault("registrar", f"keys in {folder} that can be used", str(error))) from None


def load_registrar(folder: Path, current: Roster) -> Registrar | None:
    """Return the registrar of a coordinator's folder, if the roster has its delegation.

    Raises:
        ConfigError: if its keys cannot be used.
    """
    delegation = current.delegation
    if delegation is None or not (folder / SIGN_KEY).exists():
        return None
    key, ca_key, ca = load_keys(folder)
    # Of another coordinator of the federation, or of keys that were made anew since.
    if (public_bytes(key), ca) != (delegation.key, delegation.ca):
        return None
    return Registrar(key, ca_key, delegation)


# ---- what it signs ----


def current_renewals(data: bytes, root: bytes) -> Renewals:
    """Return what a roster file holds of its registrar; nothing yet where the root alone has signed it.

    Raises:
        WireError: if the file is not valid.
    """
    known = roster.decode(data, root)
    if not data.startswith(START):
        return Renewals(data, known.version, 0, ())
    assert known.delegation is not None  # `decode` has seen it
    return decode_renewals(*split_file(data), known.delegation, known.federation)


def last_second(registrar: Registrar, *, now: int) -> int:
    """Return until when a certificate lasts that is issued now."""
    return min(now + CERTIFICATE_DAYS * DAY_S, registrar.delegation.not_after)


def issue(
    registrar: Registrar, data: bytes, root: bytes, request: enrollment.Request, statement: bytes, *, now: int
) -> tuple[bytes, bytes]:
    """Return a further certificate for an active client's own TLS key, and the roster file that names it.

    Raises:
        WireError: if the request is for more than that, or the client has not signed for its TLS key.
    """
    known = roster.decode(data, root)
    party = known.parties.get(request.name)
    asked = (request.key, request.org, request.role)
    if party is None or party.state != "active" or asked != (party.key, party.org, "client") or party.role != "client":
        raise WireError("request: expected one of an active client with its own key; got another")
    public = certificates.csr_key(request.csr)
    end = last_second(registrar, now=now)
    pem = certificates.issue_certificate(
        public,
        f"{certificates.SCHEME}{known.federation}/{party.org}/{party.name}",
        hosts=(),
        server=False,
        days=max(1, -(-(end - now) // DAY_S)),
        ca=registrar.delegation.ca,
        ca_key=registrar.ca_key,
        now=now,
        until=end,
    )
    tls_key = certificates.key_digest(pem)
    until, signature = read_statement(statement, party.key, known.federation, party.name, tls_key)
    if until < end:
        raise WireError("statement: expected one that lasts as long as the certificate; got a shorter one")
    entry = Renewed(party.name, certificates.serial_number(pem), tls_key, end, until, signature)
    before = current_renewals(data, root)
    entries = newest_first(before.entries, entry, most=MAX_RENEWED)
    return pem, write_next(registrar, before, entries, known.federation, before.valid_until)


def extend(registrar: Registrar, data: bytes, root: bytes, *, now: int) -> bytes | None:
    """Return the roster file with a later end; None if it lasts long enough, or cannot last longer."""
    known = roster.decode(data, root)
    end = min(now + ROSTER_DAYS * DAY_S, registrar.delegation.not_after)
    if known.valid_until - now >= EXTEND_DAYS * DAY_S or end < known.valid_until + DAY_S:
        return None
    before = current_renewals(data, root)
    return write_next(registrar, before, before.entries, known.federation, end)


def adopt(registrar: Registrar, data: bytes, newer: bytes, root: bytes) -> bytes:
    """Return the root's newer roster with those renewals of the one before that still may count in it."""
    before, known, base = current_renewals(data, root), roster.decode(data, root), roster.decode(newer, root)
    entries = tuple(
        entry
        for entry in before.entries
        if (party := base.parties.get(entry.name)) is not None
        and (party.role, party.state) == ("client", "active")
        and party.key == known.parties[entry.name].key
        and entry.not_after <= registrar.delegation.not_after
    )
    if not entries:
        return newer
    after = Renewals(newer, base.version, 0, ())
    return write_next(registrar, after, entries, base.federation, 0)


def write_next(
    registrar: Registrar, before: Renewals, entries: tuple[Renewed, ...], federation: str, valid_until: int
) -> bytes:
    """Return the roster file of the next version, signed by the registrar.

    Raises:
        WireError: if every version up to the root's next one is used.
    """
    if (before.version + 1) % STRIDE == 0:
        raise WireError(
            "roster: renewals: expected a version that is free; got none; the CA's next roster has new ones"
        )
    following = Renewals(before.base, before.version + 1, valid_until, entries)
    return encode_renewals(following, federation, registrar.key)


def install_roster(folder: Path, data: bytes, *, now: int) -> Roster:
    """Install a newer roster in a folder, as `enrollment.install_roster`; a registrar there keeps its renewals.

    In one step: a client whose certificate a registrar has issued would be refused for good in between.

    Raises:
        WireError: if it is not signed by the pinned key, or not newer.
        ConfigError: if the folder has no identity, or the registrar's keys there cannot be used.
    """
    root = read_root_key(folder / ROOT)
    registrar = load_registrar(folder, roster.decode(data, root))
    if registrar is None:
        return enrollment.install_roster(folder, data, now=now)
    with lock_run(folder):
        current = read_required(folder / ROSTER)
        if current_renewals(current, root).base == data:
            return roster.decode(current, root)
        return enrollment.install_roster(folder, adopt(registrar, current, data, root), now=now)


def renew_client(
    folder: Path, registrar: Registrar, request: enrollment.Request, statement: bytes, *, now: int
) -> tuple[bytes, bytes]:
    """Issue a further certificate, and write the roster that names it; returns both.

    Raises:
        WireError: as `issue`.
        StoreError: if the folder cannot be written, or another process writes it now.
    """
    # Two writers would each drop what the other has signed, or bring back an older roster of the root.
    with lock_run(folder):
        root = read_root_key(folder / ROOT)
        pem, data = issue(registrar, read_required(folder / ROSTER), root, request, statement, now=now)
        write_bytes(folder / ROSTER, data)
        return pem, data


def extend_roster(folder: Path, registrar: Registrar, *, now: int) -> bool:
    """Write the roster with a later end if it is time; returns whether it was.

    Raises:
        StoreError: if the folder cannot be written, or another process writes it now.
    """
    root = read_root_key(folder / ROOT)
    if extend(registrar, read_required(folder / ROSTER), root, now=now) is None:
        return False
    with lock_run(folder):
        data = extend(registrar, read_required(folder / ROSTER), root, now=now)
        if data is not None:
            write_bytes(folder / ROSTER, data)
        return data is not None


def pack_renewed(folder: Path, pem: bytes, data: bytes) -> bytes:
    """Return the bundle of a certificate that a registrar has issued."""
    return enrollment.pack_bundle(pem, (folder / CA).read_bytes(), (folder / ROOT).read_bytes(), data)
