"""The roster: who is in a federation, with which keys and in which role; signed offline, replaced by newer only."""

from __future__ import annotations

import base64
import binascii
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import WireError
from fedtune.link.pki.signing import key_id, raw, sign, verify

KIND = "application/vnd.fedtune.roster.v1+json"
MAX_BYTES = 4 * 2**20
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
SERIAL = re.compile(r"[0-9a-f]{1,40}")
LATEST = 2**53
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
    """Of its TLS certificates, lower-case hex; two while one replaces the other."""
    not_before: int
    """Seconds since 1970."""
    not_after: int
    state: State = "active"


@dataclass(frozen=True)
class Roster:
    """All parties of a federation."""

    federation: str
    version: int
    """Rises with every change."""
    valid_until: int
    """Seconds since 1970."""
    members: Mapping[str, Party]
    """By name."""


def by_key_id(roster: Roster, key: bytes) -> Party | None:
    """Return the active member whose key is known by this id."""
    return next((one for one in roster.members.values() if one.state == "active" and key_id(one.key) == key), None)


def encode(roster: Roster, root: Ed25519PrivateKey) -> bytes:
    """Return the roster as a DSSE envelope in JSON, signed by the federation's root key."""
    members = [
        {
            "name": one.name,
            "org": one.org,
            "role": one.role,
            "key": base64.b64encode(one.key).decode(),
            "serials": list(one.serials),
            "not_before": one.not_before,
            "not_after": one.not_after,
            "state": one.state,
        }
        for _, one in sorted(roster.members.items())
    ]
    body = {
        "federation": roster.federation,
        "version": roster.version,
        "valid_until": roster.valid_until,
        "members": members,
    }
    return make_dsse(KIND, canonical(body), root)


def decode(data: bytes, root: bytes) -> Roster:
    """Return the roster that the root key (32 bytes) has signed.

    Raises:
        WireError: if it is too large, malformed, or signed by another key.
    """
    body = verify_dsse(data, KIND, root, "roster")
    federation, version, valid_until, members = fields(
        body, {"federation": str, "version": int, "valid_until": int, "members": list}, "roster"
    )
    found = [member(one) for one in members]
    if len({one.name for one in found}) != len(found):
        raise WireError("roster: expected each name once; got one twice")
    keys = [one.key for one in found if one.state == "active"]
    if len(set(keys)) != len(keys):  # a signature would be of either
        raise WireError("roster: expected each key once; got one of two members")
    if not NAME.fullmatch(federation) or not 1 <= version <= LATEST or not 0 <= valid_until <= LATEST:
        raise WireError(f"roster: expected a federation, a version and a time; got {federation[:100]!r}, {version}")
    return Roster(federation, version, valid_until, {one.name: one for one in found})


def member(body: Any) -> Party:
    """Return a member of a roster as it was read.

    Raises:
        WireError: if anything of it is not what it should be.
    """
    name, org, role, key, serials, not_before, not_after, state = fields(
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
    if len(serials) > 4 or not all(isinstance(one, str) and SERIAL.fullmatch(one) for one in serials):
        raise WireError(f"roster: {name}: expected at most 4 serials in lower-case hex; got others")
    if not 0 <= not_before <= not_after <= LATEST:
        raise WireError(f"roster: {name}: expected a time from, and one to after it; got {not_before}, {not_after}")
    public = decode_base64(key, f"roster: {name}: key")
    if len(public) != 32:
        raise WireError(f"roster: {name}: expected a key of 32 bytes; got {len(public)}")
    return Party(name, org, role, public, tuple(serials), not_before, not_after, state)


def newer(held: Roster | None, found: Roster, *, now: int) -> Roster:
    """Return `found` if it may take the place of the roster that is held.

    Raises:
        WireError: if it is older, of another federation, expired, or another one of the same version.
    """
    if now > found.valid_until:
        raise WireError(f"roster: expected one that is valid; version {found.version} has expired; get a newer one")
    if held is None:
        return found
    if found.federation != held.federation:
        raise WireError(f"roster: expected one of {held.federation}; got one of {found.federation}")
    if found.version < held.version:
        raise WireError(f"roster: expected version {held.version} or a later one; got {found.version}")
    if found.version == held.version and found != held:
        raise WireError(f"roster: expected one version {held.version}; got two that differ; ask who signed them")
    return found


class RosterFile:
    """A signed roster on disk, read again when it changes; what is wrong with a new one never harms the one before."""

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
        self._stamp = self._found()
        self.data = read(path)
        """The current roster as it was signed."""
        self._roster = decode(self.data, root)
        self._looked, self.problem = clock(), ""
        """Why the file's newest content is not used; empty if it is."""

    def current(self) -> Roster:
        """Return the newest roster that is good; looks at the file at most once a second."""
        if self._clock() - self._looked >= 1.0:
            self._looked = self._clock()
            if (stamp := self._found()) != self._stamp:
                self._stamp = stamp
                try:
                    data = read(self._path)
                    self._roster = newer(self._roster, decode(data, self._root), now=int(self._now()))
                    self.data, self.problem = data, ""
                except WireError as error:
                    self.problem = str(error)
        return self._roster

    def _found(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_size, found.st_ino


def read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise WireError(f"{path}: expected a signed roster; {error.strerror or error}") from None


# ---- signed JSON, for rosters and requests ----


def canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def make_dsse(kind: str, payload: bytes, key: Ed25519PrivateKey, *others: Mapping[str, str]) -> bytes:
    """Return a payload in a DSSE envelope, signed; other signatures stand behind the first."""
    first = {"keyid": key_id(raw(key)).hex(), "sig": base64.b64encode(sign(key, kind, payload)).decode()}
    body = {"payloadType": kind, "payload": base64.b64encode(payload).decode(), "signatures": [first, *others]}
    return canonical(body) + b"\n"


def verify_dsse(data: bytes, kind: str, public: bytes, what: str) -> Any:
    """Return the JSON of a DSSE envelope whose one signature is of this key.

    Raises:
        WireError: if it is too large, malformed, or not signed so.
    """
    payload, signatures = parse_dsse(data, kind, what)
    if len(signatures) != 1 or not by(public, kind, payload, signatures[0]):
        raise WireError(f"{what}: expected a signature by the key {key_id(public).hex()[:16]}; got none that holds")
    return strict(payload, what)


def by(public: bytes, kind: str, payload: bytes, signature: tuple[str, bytes]) -> bool:
    """Return whether a signature of an envelope is of this key, and says so."""
    name, value = signature
    return name == key_id(public).hex() and verify(public, kind, payload, value)


def parse_dsse(data: bytes, kind: str, what: str) -> tuple[bytes, Sequence[tuple[str, bytes]]]:
    """Return payload and signatures of a DSSE envelope; none of them is verified.

    Raises:
        WireError: if it is none of this kind.
    """
    if len(data) > MAX_BYTES:
        raise WireError(f"{what}: expected at most {MAX_BYTES} bytes; got more")
    body = strict(data, what)
    found, payload, signatures = fields(body, {"payloadType": str, "payload": str, "signatures": list}, what)
    if found != kind:
        raise WireError(f"{what}: expected the type {kind}; got {found[:100]!r}")
    if not 1 <= len(signatures) <= 2:
        raise WireError(f"{what}: expected one or two signatures; got {len(signatures)}")
    pairs = [fields(one, {"keyid": str, "sig": str}, f"{what}: signature") for one in signatures]
    if data.removesuffix(b"\n") != canonical(body):  # what is not signed has one spelling, so that no byte is idle
        raise WireError(f"{what}: expected the file as it was written; got another spelling of it; fetch it again")
    return decode_base64(payload, what), [(name, decode_base64(signature, what)) for name, signature in pairs]


def strict(data: bytes, what: str) -> Any:
    """Return JSON in which no key stands twice.

    Raises:
        WireError: if it is none.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise WireError(f"{what}: expected each key once; got one twice")
        return dict(pairs)

    try:
        return json.loads(data.decode("ascii"), object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise WireError(f"{what}: expected JSON; got {len(data)} bytes that are none") from None


def fields(body: Any, types: Mapping[str, type], what: str) -> tuple[Any, ...]:
    """Return the values of exactly these keys, in this order.

    Raises:
        WireError: if keys or types are others.
    """
    if not isinstance(body, dict) or body.keys() != types.keys():
        raise WireError(f"{what}: expected the keys {', '.join(types)}; got others")
    for name, kind in types.items():
        if type(body[name]) is not kind:
            raise WireError(f"{what}: {name}: expected {kind.__name__}; got {type(body[name]).__name__}")
    return tuple(body[name] for name in types)


def decode_base64(text: str, what: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if base64.b64encode(data).decode() != text:  # of several spellings of the same bytes one counts
        raise WireError(f"{what}: expected base64; got something else")
    return data
