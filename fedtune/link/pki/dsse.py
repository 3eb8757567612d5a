"""Signed JSON: a payload in a DSSE envelope with one spelling, verified before anything of it is parsed."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import WireError
from fedtune.link.pki.signing import key_id, public_bytes, sign, verify

MAX_BYTES = 4 * 2**20
"""Of a signed file."""


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
