"""Ed25519 signatures over DSSE's pre-authentication encoding, verified before anything is parsed."""

from __future__ import annotations

from hashlib import sha256

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


def pae(kind: str, payload: bytes) -> bytes:
    """Return DSSE's pre-authentication encoding (github.com/secure-systems-lab/dsse, protocol.md).

    >>> pae("http://example.com/HelloWorld", b"hello world")
    b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    """
    name = kind.encode()
    # Lengths first: no type and payload have the encoding of another pair.
    return b"DSSEv1 %d %s %d %s" % (len(name), name, len(payload), payload)


def sign(key: Ed25519PrivateKey, kind: str, payload: bytes) -> bytes:
    return key.sign(pae(kind, payload))


def verify(public: bytes, kind: str, payload: bytes, signature: bytes) -> bool:
    """Return whether a signature is made with this public key (32 bytes); False for anything malformed."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, pae(kind, payload))
    except (InvalidSignature, ValueError):
        return False
    return True


def public_bytes(key: Ed25519PrivateKey) -> bytes:
    """Return the public key of a private key, 32 bytes."""
    return key.public_key().public_bytes_raw()


def key_id(public: bytes) -> bytes:
    """Return the id of a public key in a statement: the first 16 bytes of its SHA-256."""
    return sha256(public).digest()[:16]


def fingerprint(data: bytes) -> str:
    """Return a fingerprint to compare by voice: 128 bits of the SHA-256 as eight groups of four hex digits."""
    digits = sha256(data).hexdigest()[:32]
    return " ".join(digits[at : at + 4] for at in range(0, 32, 4))


def is_fingerprint(text: str, actual: str) -> bool:
    """Return whether a text is a fingerprint, however it is spaced and spelled.

    >>> is_fingerprint("AB12 cd34", "ab12cd34")
    True
    """
    return "".join(text.split()).lower() == "".join(actual.split()).lower()
