"""The roster: parties of a federation with their keys and roles; signed offline, replaced by newer versions only."""

from __future__ import annotations

import base64
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import WireError
from fedtune.link.pki.delegation import (
    START,
    STRIDE,
    Delegation,
    Renewals,
    Renewed,
    decode_delegation,
    decode_renewals,
    delegation_json,
    is_stated,
    split_file,
)
from fedtune.link.pki.dsse import MAX_BYTES, canonical_json, decode_base64, make_dsse, read_fields, verify_dsse
from fedtune.link.pki.signing import key_id

KIND = "application/vnd.fedtune.roster.v1+json"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SERIAL = re.compile(r"[0-9a-f]{1,40}")
LATEST = 2**53
"""Largest integer that every JSON reader keeps exactly."""
SKEW_S = 3600
"""Seconds by which a clock may be behind that of the CA: a party that was enrolled just now counts at once."""
MAX_RENEWED = 2
"""Certificates of a client by a registrar that count at the same time."""
RECHECK_S = 1.0
"""Seconds; every call of every client asks for the roster."""
Role: TypeAlias = Literal["coordinator", "client", "auditor"]
State: TypeAlias = Literal["active", "revoked"]


@dataclass(frozen=True)
class Party:
    """One party of a federation."""

    name: str
    org: str
    role: Role
    key: bytes
    """Ed25519 public key, 32 bytes."""
    serials: tuple[str, ...]
    """Serial numbers of its TLS certificates in lower-case hex; two while one replaces the other."""
    not_before: int
    """Seconds since 1970."""
    not_after: int
    state: State = "active"
    renewed: tuple[Renewed, ...] = ()
    """Certificates of a client that a registrar has issued; they count beside those of `serials`."""


@dataclass(frozen=True)
class Roster:
    """All parties of a federation."""

    federation: str
    version: int
    """One more with every change."""
    valid_until: int
    """Seconds since 1970."""
    parties: Mapping[str, Party]
    """By name."""
    delegation: Delegation | None = None
    """What the root allows a registrar; None: there is none."""


def find_party(roster: Roster, key: bytes) -> Party | None:
    """Return the active party whose key has this id; None if there is none."""
    parties = roster.parties.values()
    return next((party for party in parties if party.state == "active" and key_id(party.key) == key), None)


def encode(roster: Roster, root: Ed25519PrivateKey) -> bytes:
    """Return the roster as a DSSE envelope in JSON, signed by the federation's root key."""
    members = [
        {
            "name": party.name,
            "org": party.org,
            "role": party.role,
            "key": base64.b64encode(party.key).decode(),
            "serials": list(party.serials),
            "not_before": party.not_before,
            "not_after": party.not_after,
            "state": party.state,
        }
        for _, party in sorted(roster.parties.items())
    ]
    body = {
        "federation": roster.federation,
        "version": roster.version,
        "valid_until": roster.valid_until,
        "members": members,
        # Left out where there is none: the roster then has the bytes that every release reads.
        **({} if roster.delegation is None else {"delegation": delegation_json(roster.delegation)}),
    }
    return make_dsse(KIND, canonical_json(body), root)


def decode(data: bytes, root: bytes) -> Roster:
    """Return the roster that the root key (32 bytes) has signed, with what its registrar has renewed.

    Raises:
        WireError: if it is too large, malformed, signed by another key, or says more than a registrar may.
    """
    if not data.startswith(START):
        return decode_base(data, root)
    signed, renewed = split_file(data)
    base = decode_base(signed, root)
    if base.delegation is None:
        raise WireError("roster: expected one of the root alone; got renewals, for which it names no registrar")
    return apply_renewals(base, decode_renewals(signed, renewed, base.delegation, base.federation))


def apply_renewals(base: Roster, renewals: Renewals) -> Roster:
    """Return a roster of the root with what its registrar has renewed.

    Raises:
        WireError: if a renewal is for another party than an active client, or its client has not signed for it.
    """
    if base.version % STRIDE or not base.version < renewals.version < base.version + STRIDE:
        raise WireError(f"roster: renewals: expected a version after {base.version}; got {renewals.version}")
    parties = dict(base.parties)
    for entry in renewals.entries:
        party = parties.get(entry.name)
        if party is None or party.role != "client" or party.state != "active":
            got = "another party" if party is None else f"{party.role}, {party.state}"
            raise WireError(
                f"roster: renewals: expected an active client of the roster; got {entry.name[:50]!r}, {got}"
            )
        if not is_stated(entry, party.key, base.federation):
            raise WireError(f"roster: renewals: expected a TLS key for which {entry.name} has signed; got another")
        if len(party.renewed) >= MAX_RENEWED:
            raise WireError(f"roster: renewals: expected at most {MAX_RENEWED} of {entry.name}; got more")
        parties[entry.name] = replace(
            party, renewed=(*party.renewed, entry), not_after=max(party.not_after, entry.not_after)
        )
    valid_until = max(base.valid_until, renewals.valid_until)
    return replace(base, version=renewals.version, valid_until=valid_until, parties=parties)


def decode_base(data: bytes, root: bytes) -> Roster:
    """Return the roster of an envelope of the root key; see `decode`."""
    body = verify_dsse(data, KIND, root, "roster")
    types = {"federation": str, "version": int, "valid_until": int, "members": list}
    if isinstance(body, dict) and "delegation" in body:
        *values, said = read_fields(body, {**types, "delegation": dict}, "roster")
        delegation = decode_delegation(said)
    else:
        values, delegation = [*read_fields(body, types, "roster")], None
    federation, version, valid_until, members = values
    parties = [decode_party(member) for member in members]
    if len({party.name for party in parties}) != len(parties):
        raise WireError("roster: expected each name once; got one twice")
    keys = [party.key for party in parties if party.state == "active"]
    # One party could sign in the name of the other.
    if len(set(keys)) != len(keys):
        raise WireError("roster: expected each key once; got one of two parties")
    if not NAME.fullmatch(federation) or not 1 <= version <= LATEST or not 0 <= valid_until <= LATEST:
        raise WireError(f"roster: expected a federation, a version and a time; got {federation[:100]!r}, {version}")
    return Roster(federation, version, valid_until, {party.name: party for party in parties}, delegation)


def decode_party(body: Any) -> Party:
    """Return a party from the JSON of a roster.

    Raises:
        WireError: if a key, a type or a value is not of a roster.
    """
    name, org, role, key, serials, not_before, not_after, state = read_fields(
        body,
        {
            "name": str,
            "org": str,
            "role": str,
            "key": str,
            "serials": list,
            "not_before": int,
            "not_after": int,
            "state": str,
        },
        "roster: member",
    )
    if not NAME.fullmatch(name) or not NAME.fullmatch(org):
        raise WireError(f"roster: expected names of letters, digits, '.', '_' and '-'; got {name[:50]!r}, {org[:50]!r}")
    if role not in get_args(Role) or state not in get_args(State):
        raise WireError(f"roster: {name}: expected a role and a state; got {role[:20]!r}, {state[:20]!r}")
    if len(serials) > 4 or not all(isinstance(serial, str) and SERIAL.fullmatch(serial) for serial in serials):
        raise WireError(f"roster: {name}: expected at most 4 serials in lower-case hex; got others")
    if not 0 <= not_before <= not_after <= LATEST:
        raise WireError(f"roster: {name}: expected a time from, and one to after it; got {not_before}, {not_after}")
    public = decode_base64(key, f"roster: {name}: key")
    if len(public) != 32:
        raise WireError(f"roster: {name}: expected a key of 32 bytes; got {len(public)}")
    return Party(name, org, role, public, tuple(serials), not_before, not_after, state)


def check_successor(current: Roster | None, new: Roster, *, now: int) -> Roster:
    """Return the new roster if it may replace the current one.

    Raises:
        WireError: if it is older, of another federation, expired, or differs under the same version.
    """
    if now > new.valid_until:
        raise WireError(f"roster: expected one that is valid; version {new.version} has expired; get a newer one")
    if current is None:
        return new
    if new.federation != current.federation:
        raise WireError(f"roster: expected one of {current.federation}; got one of {new.federation}")
    # An older one may name a party that has been revoked since.
    if new.version < current.version:
        raise WireError(f"roster: expected version {current.version} or a later one; got {new.version}")
    if new.version == current.version and new != current:
        raise WireError(f"roster: expected one version {current.version}; got two that differ; ask who signed them")
    return new


class RosterFile:
    """A signed roster on disk, read again when it changes; a new file that is not valid leaves the roster as it was."""

    def __init__(
        self,
        path: Path,
        root: bytes,
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ) -> None:
        """Read the file.

        Raises:
            WireError: if it is not a roster that the root key has signed.
        """
        self._path, self._root, self._clock, self._now = path, root, clock, now
        # Before the read: a file that is replaced meanwhile has another stamp, and is read again.
        self._stamp = self._file_stamp()
        self.data = read_roster_bytes(path)
        """The current roster as it was signed."""
        self._roster = decode(self.data, root)
        self._checked_at, self.problem = clock(), ""
        """Why the file's newest content is not used; empty if it is."""

    def current(self) -> Roster:
        """Return the newest valid roster; looks at the file at most once in `RECHECK_S`."""
        if self._clock() - self._checked_at >= RECHECK_S:
            self._checked_at = self._clock()
            if (stamp := self._file_stamp()) != self._stamp:
                # Also of a file that turns out not to be valid: it is not parsed again with every call.
                self._stamp = stamp
                try:
                    data = read_roster_bytes(self._path)
                    self._roster = check_successor(self._roster, decode(data, self._root), now=int(self._now()))
                    self.data, self.problem = data, ""
                except WireError as error:
                    self.problem = str(error)
        return self._roster

    def refresh(self) -> Roster:
        """Return the newest valid roster after a look at the file, however recent the last one was."""
        self._checked_at = -math.inf
        return self.current()

    def _file_stamp(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat()
        except OSError:
            return 0, 0, 0
        # The inode, too: a file replaced within one tick of the clock may have the same time and size.
        return status.st_mtime_ns, status.st_size, status.st_ino


def read_roster_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            # One byte more than allowed is enough to refuse a file that is too large.
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise WireError(f"{path}: expected a signed roster; {error.strerror or error}") from None
