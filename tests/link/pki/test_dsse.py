from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import WireError
from fedtune.link.pki.dsse import (
    MAX_BYTES,
    canonical_json,
    decode_base64,
    make_dsse,
    parse_dsse,
    parse_json,
    verify_dsse,
)
from fedtune.link.pki.signing import public_bytes

KEY, OTHER = Ed25519PrivateKey.from_private_bytes(bytes(32)), Ed25519PrivateKey.from_private_bytes(b"\1" * 32)
KIND = "application/vnd.example+json"
SIGNED = make_dsse(KIND, canonical_json({"a": 1}), KEY)


def test_what_was_signed_comes_back() -> None:
    assert verify_dsse(SIGNED, KIND, public_bytes(KEY), "file") == {"a": 1}
    assert parse_dsse(SIGNED, KIND, "file")[0] == b'{"a":1}'


def test_another_key_another_kind_another_spelling_and_a_second_signature_are_refused() -> None:
    for data, kind, key in (
        (SIGNED, KIND, OTHER),
        (SIGNED, "application/other", KEY),
        (SIGNED.replace(b'","', b'", "'), KIND, KEY),
        (make_dsse(KIND, b"{}", KEY, {"keyid": "x", "sig": "AA=="}), KIND, KEY),
        (b"1" * (MAX_BYTES + 1), KIND, KEY),
    ):
        with pytest.raises(WireError, match="file: expected"):
            verify_dsse(data, kind, public_bytes(key), "file")


def test_json_with_a_key_twice_and_base64_with_spare_bits_are_refused() -> None:
    for data in (b'{"a":1,"a":2}', b"[" * 100_000, "{\u00e9}".encode()):
        with pytest.raises(WireError):
            parse_json(data, "file")
    for text in ("AB==", "A", "!!!!"):
        with pytest.raises(WireError):
            decode_base64(text, "file")
