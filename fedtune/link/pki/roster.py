"""The roster: parties of a federation with their keys and roles; signed offline, replaced by newer versions only."""

from __future__ import annotations

import base64
import binascii
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import WireError
from fedtune.link.pki.signing import key_id, public_bytes, sign, verify

KIND = "application/vnd.fedtune.roster.v1+json"
MAX_BYTES = 4 * 2**20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SERIAL = re.compile(r"[0-9a-f]{1,40}")
LATEST = 2**53
"""Largest integer that every JSON reader keeps exactly."""
SKEW_S = 3600
"""Seconds by which a clock may be behind that of the CA: a party that was enrolled just now counts at once."""
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
    }
    return make_dsse(KIND, canonical_json(body), root)


def decode(data: bytes, root: bytes) -> Roster:
    """Return the roster that the root key (32 bytes) has signed.

    Raises:
        WireError: if it is too large, malformed, or signed by another key.
    """
    body = verify_dsse(data, KIND, root, "roster")
    federation, version, valid_until, members = read_fields(
        body, {"federation": str, "version": int, "valid_until": int, "members": list}, "roster"
    )
    parties = [decode_party(member) for member in members]
    if len({party.name for party in parties}) != len(parties):
        raise WireError("roster: expected each name once; got one twice")
    keys = [party.key for party in parties if party.state == "active"]
    # One party could sign in the name of the other.
    if len(set(keys)) != len(keys):
        raise WireError("roster: expected each key once; got one of two parties")
    if not NAME.fullmatch(federation) or not 1 <= version <= LATEST or not 0 <= valid_until <= LATEST:
        raise WireError(f"roster: expected a federation, a version and a time; got {federation[:100]!r}, {version}")
    return Roster(federation, version, valid_until, {party.name: party for party in parties})


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


# ---- signed JSON, for rosters and requests ----


def canonical_json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def make_dsse(kind: str, payload: bytes, key: Ed25519PrivateKey, *others: Mapping[str, str]) -> bytes:
    """Return a payload in a signed DSSE envelope; `others` are further signatures, behind the first."""
    first = {"keyid": key_id(public_bytes(key)).hex(), "sig": base64.b64encode(sign(key, kind, payload)).decode()}
    body = {"payloadType": kind, "payload": base64.b64encode(payload).decode(), "signatures": [first, *others]}
    return canonical_json(body) + b"\n"


def verify_dsse(data: bytes, kind: str, public: bytes, what: str) -> Any:
    """Return the JSON of a DSSE envelope whose one signature is of this key.

    Raises:
        WireError: if it is too large, malformed, or not signed by this key alone.
    """
    payload, signatures = parse_dsse(data, kind, what)
    if len(signatures) != 1 or not is_signed_by(public, kind, payload, signatures[0]):
        raise WireError(f"{what}: expected a signature by the key {key_id(public).hex()[:16]}; got none that holds")
    return parse_json(payload, what)


def is_signed_by(public: bytes, kind: str, payload: bytes, signature: tuple[str, bytes]) -> bool:
    """Return whether a signature of an envelope names this key and is made with it."""
    # The id of the key is not signed itself, and must not be free to change.
    name, value = signature
    return name == key_id(public).hex() and verify(public, kind, payload, value)


def parse_dsse(data: bytes, kind: str, what: str) -> tuple[bytes, Sequence[tuple[str, bytes]]]:
    """Return payload and signatures of a DSSE envelope, not verified.

    Raises:
        WireError: if it is no envelope of this kind.
    """
    if len(data) > MAX_BYTES:
        raise WireError(f"{what}: expected at most {MAX_BYTES} bytes; got more")
    body = parse_json(data, what)
    payload_kind, payload, signatures = read_fields(
        body, {"payloadType": str, "payload": str, "signatures": list}, what
    )
    if payload_kind != kind:
        raise WireError(f"{what}: expected the type {kind}; got {payload_kind[:100]!r}")
    if not 1 <= len(signatures) <= 2:
        raise WireError(f"{what}: expected one or two signatures; got {len(signatures)}")
    pairs = [read_fields(signature, {"keyid": str, "sig": str}, f"{what}: signature") for signature in signatures]
    # White space and the order of keys are not signed. With one spelling only, no byte can change unseen.
    if data.removesuffix(b"\n") != canonical_json(body):
        raise WireError(f"{what}: expected the file as it was written; got another spelling of it; fetch it again")
    return decode_base64(payload, what), [(name, decode_base64(signature, what)) for name, signature in pairs]


def parse_json(data: bytes, what: str) -> Any:
    """Return parsed JSON, in which no key may occur twice: two readers could take different ones.

    Raises:
        WireError: if it is no JSON, or not ASCII.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise WireError(f"{what}: expected each key once; got one twice")
        return dict(pairs)

    try:
        return json.loads(data.decode("ascii"), object_pairs_hook=once)
    # RecursionError: brackets within brackets, thousands deep.
    except (ValueError, RecursionError):
        raise WireError(f"{what}: expected JSON; got {len(data)} bytes that are none") from None


def read_fields(body: Any, types: Mapping[str, type], what: str) -> tuple[Any, ...]:
    """Return the values of an object that has exactly these keys, in their order here.

    Raises:
        WireError: if a key is missing or unknown, or a value has another type.
    """
    if not isinstance(body, dict) or body.keys() != types.keys():
        raise WireError(f"{what}: expected the keys {', '.join(types)}; got others")
    for name, kind in types.items():
        # Not isinstance: True is an int.
        if type(body[name]) is not kind:
            raise WireError(f"{what}: {name}: expected {kind.__name__}; got {type(body[name]).__name__}")
    return tuple(body[name] for name in types)


def decode_base64(text: str, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    # Unused bits could differ, and so one key have two spellings.
    if base64.b64encode(data).decode() != text:
        raise WireError(f"{what}: expected base64; got something else")
    return data
