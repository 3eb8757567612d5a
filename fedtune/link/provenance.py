"""Signed provenance of a folder: an in-toto statement of its files in a DSSE envelope, by the federation's coordinator.

in-toto Statement v1 (github.com/in-toto/attestation, spec/v1/statement.md); DSSE 1.0 (secure-systems-lab/dsse).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import ConfigError, Fault, StoreError, WireError
from fedtune.link.pki.authority import ROSTER_PUB
from fedtune.link.pki.dsse import canonical_json, is_signed_by, make_dsse, parse_dsse, parse_json
from fedtune.link.pki.identity import ROOT, read_root_key
from fedtune.link.pki.roster import Party, Roster, decode, read_roster_bytes
from fedtune.link.pki.signing import key_id
from fedtune.store import manifest
from fedtune.store.files import write_bytes
from fedtune.store.manifest import FileFacts, ResultFolder

KIND = "application/vnd.in-toto+json"
STATEMENT, PREDICATE = "https://in-toto.io/Statement/v1", "urn:fedtune:provenance:v1"
WIRE_NAME = f"{manifest.SIGNATURE}.json"
"""Of the envelope on its way to a site: those of 0.2.0 take no other ends of names."""
STATED = (
    "fedtune", "name", "recipe", "method", "round", "state_digest", "base", "guard", "training", "source", "merged",
)  # fmt: skip
"""What a predicate repeats of the manifest, for readers of the statement alone."""
SKEW_S = 300
"""Seconds that the signer's clock may be ahead."""
AGAIN = "get the folder again from its coordinator"


@dataclass(frozen=True)
class Signer:
    """The coordinator that signs, as the roster names it."""

    federation: str
    name: str
    key: Ed25519PrivateKey


@dataclass(frozen=True)
class Provenance:
    """What was verified of a folder."""

    signer: Party
    federation: str
    signed_at: int
    """Seconds since 1970, by the signer's own clock: nothing else attests it."""
    files: int
    """Whose digests are signed and hold, the manifest among them."""
    predicate: Mapping[str, Any]


def sign_folder(path: Path, signer: Signer, *, now: int, training: Mapping[str, Any] | None = None) -> Path:
    """Check a folder against its manifest, sign it, and return the envelope beside the manifest.

    Args:
        path: of the folder.
        signer: see there.
        now: seconds since 1970.
        training: what the run's journal says, where the manifest does not.

    Raises:
        StoreError: if the folder has no manifest, or a file is another one than it lists.
    """
    opened = manifest.open_folder(path)
    if opened.listed is None:
        raise StoreError(f"{opened.remark}; expected a manifest to sign; export the result again")
    opened.check()
    facts = {**({"training": training} if training else {}), **opened.facts}
    envelope = make_envelope(opened.listed, opened.digest, facts, signer, now=now)
    write_bytes(path / manifest.SIGNATURE, envelope)
    return path / manifest.SIGNATURE


def make_envelope(
    listed: Mapping[str, FileFacts], digest: str, facts: Mapping[str, Any], signer: Signer, *, now: int
) -> bytes:
    """Return the signed statement of files.

    Args:
        listed: as the manifest lists them.
        digest: SHA-256 (hex) of the manifest.
        facts: as the manifest states them.
        signer: see there.
        now: seconds since 1970.
    """
    digests = {**{name: file.sha256 for name, file in listed.items()}, manifest.NAME: digest}
    statement = {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": value}} for name, value in sorted(digests.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "federation": signer.federation,
            "signer": signer.name,
            "signed_at": now,
            **{key: facts[key] for key in STATED if key in facts},
        },
    }
    return make_dsse(KIND, canonical_json(statement), signer.key)


def verify_folder(path: Path, roster: Roster, *, now: int | None = None) -> Provenance:
    """Return the verified provenance of a folder.

    Args:
        path: of the folder.
        roster: of the federation, whose root key has been verified; whether it is still valid is the caller's to check.
        now: seconds since 1970; this machine's clock without it.

    Raises:
        StoreError: naming the first difference: signature, signer, role, time, or a file.
    """
    file = path / manifest.SIGNATURE
    if not os.path.lexists(file):
        raise StoreError(f"{file}: expected a signature; got none; the coordinator writes it with fedtune sign")
    data = manifest.read_bounded(file)
    try:
        payload, signatures = parse_dsse(data, KIND, str(file))
        party = signer_of(payload, signatures, roster, file)
        statement = parse_json(payload, str(file))
    except WireError as error:
        raise StoreError(f"{error}; {AGAIN}") from error
    digests, predicate = parse_statement(statement, file)
    check_signer(party, predicate, roster, file, now=int(time.time()) if now is None else now)
    opened = manifest.open_folder(path)
    if opened.digest != digests.get(manifest.NAME):
        got = opened.digest[:12] or "one without digests"
        expected = str(digests.get(manifest.NAME))[:12]
        raise StoreError(f"{path / manifest.NAME}: expected the digest {expected}, as was signed; got {got}; {AGAIN}")
    check_subjects(opened, digests, file)
    opened.check()
    return Provenance(party, roster.federation, int(predicate["signed_at"]), len(digests), predicate)


def check_statement(opened: ResultFolder) -> bool:
    """Check that the signed statement in a folder, if it has one, is of its files; returns whether it has one.

    By whom it is signed, and whether that holds, only a roster says; see `verify_folder`.

    Raises:
        StoreError: if it is no statement of ours, or of other files.
    """
    file = opened.path / manifest.SIGNATURE
    if not os.path.lexists(file):
        return False
    try:
        payload, _ = parse_dsse(manifest.read_bounded(file), KIND, str(file))
        digests, _ = parse_statement(parse_json(payload, str(file)), file)
    except WireError as error:
        raise StoreError(f"{error}; sign the folder again with fedtune sign") from error
    check_subjects(opened, digests, file)
    if opened.digest != digests.get(manifest.NAME):
        expected = f"the digest {opened.digest[:12]} of {manifest.NAME}"
        raise StoreError(f"{file}: expected {expected}; got {digests.get(manifest.NAME, 'none')[:12]}; {AGAIN}")
    return True


def load_roster(
    path: Path, root: Path | None, *, expired: bool = False, now: int | None = None
) -> tuple[Roster, bytes]:
    """Return a roster from its file, and the public key that has signed it.

    Args:
        path: of the signed roster.
        root: file of the public key; without it the one beside the roster, as identity and CA folders have it.
        expired: whether one that has expired is taken.
        now: seconds since 1970; this machine's clock without it.

    Raises:
        ConfigError: if there is no public key, or the roster has expired.
        WireError: if the roster is not signed by that key.
    """
    places = [root] if root is not None else [path.parent / name for name in (ROOT, ROSTER_PUB)]
    key_file = next((place for place in places if place.is_file()), None)
    if key_file is None:
        expected = "the public key that signs the federation's rosters"
        raise ConfigError(Fault("--root", expected, f"none at {places[0]}", "give --root KEY"))
    key = read_root_key(key_file)
    roster = decode(read_roster_bytes(path), key)
    if not expired and (int(time.time()) if now is None else now) > roster.valid_until:
        got = f"version {roster.version}, valid until {stamp(roster.valid_until)}"
        hint = "get the newest one, or take this one with --expired-roster: revocations since then are not known"
        raise ConfigError(Fault("--roster", "a roster that is valid", got, hint))
    return roster, key


def signer_of(payload: bytes, signatures: Any, roster: Roster, file: Path) -> Party:
    """Return the party of a roster whose key has made the one signature of an envelope.

    Raises:
        StoreError: if there is none.
    """
    parties = {key_id(party.key).hex(): party for party in roster.parties.values()}
    name = signatures[0][0]
    party = parties.get(name)
    if len(signatures) != 1 or party is None:
        raise StoreError(
            f"{file}: expected one signature by a key of {roster.federation}'s roster (version {roster.version}); "
            f"got {len(signatures)}, by the key {name[:16]!r}; take the federation's own newest roster"
        )
    if not is_signed_by(party.key, KIND, payload, signatures[0]):
        raise StoreError(f"{file}: expected a signature by {party.name} that holds; got another; {AGAIN}")
    return party


def parse_statement(statement: Any, file: Path) -> tuple[Mapping[str, str], Mapping[str, Any]]:
    """Return the digests by name, and the predicate, of a statement whose signature holds.

    Raises:
        StoreError: if it is no statement of ours.
    """
    try:
        kinds = statement["_type"], statement["predicateType"]
        predicate = statement["predicate"]
        digests = {str(entry["name"]): str(entry["digest"]["sha256"]) for entry in statement["subject"]}
        whole = kinds == (STATEMENT, PREDICATE) and len(digests) == len(statement["subject"])
        whole = whole and type(predicate["signed_at"]) is int
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise StoreError(f"{file}: expected a statement of the type {PREDICATE}; got another; use its own program")
    return digests, predicate


def check_signer(party: Party, predicate: Mapping[str, Any], roster: Roster, file: Path, *, now: int) -> None:
    """Check that a party might sign, and at the time that it states.

    Raises:
        StoreError: naming what it may not.
    """
    if party.role != "coordinator":
        raise StoreError(f"{file}: expected a signature by a coordinator; got one by {party.name}, a {party.role}")
    # Whatever the stated time: it is the signer's own word, and a stolen key states any time that is needed.
    if party.state != "active":
        raise StoreError(f"{file}: expected a signer that is not revoked; got {party.name}; have it signed again")
    if (predicate.get("federation"), predicate.get("signer")) != (roster.federation, party.name):
        expected = f"{party.name} of {roster.federation}"
        raise StoreError(f"{file}: expected a statement by {expected}; got one of another name; {AGAIN}")
    signed_at = predicate["signed_at"]
    if not party.not_before <= signed_at <= party.not_after:
        raise StoreError(
            f"{file}: expected a time of signing within {stamp(party.not_before)} to {stamp(party.not_after)}, in "
            f"which {party.name} was enrolled; got {stamp(signed_at)}; have it signed again"
        )
    if signed_at > now + SKEW_S:
        raise StoreError(f"{file}: expected a time of signing in the past; got {stamp(signed_at)}; check this clock")


def check_subjects(opened: ResultFolder, digests: Mapping[str, str], file: Path) -> None:
    """Check that a statement and the manifest that it signs name the same files with the same digests."""
    listed = {name: facts.sha256 for name, facts in (opened.listed or {}).items()}
    signed = {name: digest for name, digest in digests.items() if name != manifest.NAME}
    if different := sorted({name for name, _ in listed.items() ^ signed.items()}):
        raise StoreError(f"{file}: expected the digests of {manifest.NAME}; they differ for {different[0]}; {AGAIN}")


def stamp(seconds: int) -> str:
    """Return a time as a date in UTC; as a number where no calendar has it."""
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):
        return str(seconds)
