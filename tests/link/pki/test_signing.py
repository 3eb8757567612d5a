from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from fedtune.link.pki.signing import fingerprint, key_id, pae, public_bytes, sign, verify

# RFC 8032, section 7.1, test 1: the secret key and its public key
SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
KEY = Ed25519PrivateKey.from_private_bytes(SECRET)


def test_the_encoding_is_the_one_of_dsse() -> None:
    # the example of dsse's protocol.md
    assert (
        pae("http://example.com/HelloWorld", b"hello world")
        == b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )


def test_the_public_key_is_the_one_of_rfc_8032() -> None:
    assert public_bytes(KEY) == PUBLIC


@given(st.text(max_size=20), st.binary(max_size=100), st.text(max_size=20), st.binary(max_size=100))
def test_a_signature_is_of_one_type_and_one_payload(kind: str, payload: bytes, other: str, others: bytes) -> None:
    signature = sign(KEY, kind, payload)
    assert verify(PUBLIC, kind, payload, signature)
    assert verify(PUBLIC, other, others, signature) == ((other, others) == (kind, payload))


def test_what_is_malformed_is_no_signature() -> None:
    good = sign(KEY, "a", b"b")
    for public, signature in ((PUBLIC[:-1], good), (PUBLIC, good[:-1]), (PUBLIC, b""), (b"", good), (bytes(32), good)):
        assert not verify(public, "a", b"b", signature)


def test_every_flipped_bit_of_a_signature_is_found() -> None:
    good = sign(KEY, "a", b"b")
    for bit in range(8 * len(good)):
        flipped = bytearray(good)
        flipped[bit // 8] ^= 1 << bit % 8
        assert not verify(PUBLIC, "a", b"b", bytes(flipped))


def test_keys_and_fingerprints_have_their_lengths() -> None:
    assert len(key_id(PUBLIC)) == 16
    assert [len(one) for one in fingerprint(b"x").split(" ")] == [4] * 8
