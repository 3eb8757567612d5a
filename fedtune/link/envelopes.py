"""Signed statements of coordinator and clients: plans, tasks, replies and receipts, verified before they are parsed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from hashlib import sha256
from importlib.metadata import version

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.errors import WireError
from fedtune.link.pki.roster import Party
from fedtune.link.pki.signing import key_id, public_bytes, sign, verify
from fedtune.link.rejections import rejection
from fedtune.wire.codec import parse
from fedtune.wire.v1 import link_pb2 as pb
from fedtune.wire.v1 import round_pb2

PROTOCOL = 1
KIND = "application/vnd.fedtune.header.v1"
MAX_HEADER_BYTES = 64 * 1024
MAX_PARTS = 64
HELLO, TRAIN, EVALUATE, RESULT = "query.caps", "train", "evaluate", "result"
"""Kinds of tasks."""
UPDATE = "update"
"""Key of the one part of a reply to TRAIN or EVALUATE."""


@lru_cache(maxsize=1)
def build_version() -> str:
    """Return name and version of the package that runs here."""
    return f"fedtune {version('fedtune')}"


def seal(header: pb.Header, key: Ed25519PrivateKey) -> pb.Envelope:
    """Return a header as a signed envelope."""
    # Deterministic: the same task must be the same bytes, and so have the same digest, after a restart.
    data = header.SerializeToString(deterministic=True)
    return pb.Envelope(header=data, signature=sign(key, KIND, data), key_id=key_id(public_bytes(key)))


def digest(envelope: pb.Envelope) -> bytes:
    """Return the digest that identifies a statement: of its header as it was signed."""
    return sha256(envelope.header).digest()


def verify_envelope(envelope: pb.Envelope, find_author: Callable[[bytes], Party | None]) -> tuple[pb.Header, Party]:
    """Return header and author of a statement; size, key and signature are checked before anything is parsed.

    Args:
        envelope: from outside.
        find_author: returns the party with a key of this id; None if there is none.

    Raises:
        RejectionError: with the reason.
    """
    if len(envelope.header) > MAX_HEADER_BYTES:
        raise rejection(pb.HEADER_TOO_LARGE, "header", f"at most {MAX_HEADER_BYTES} bytes", len(envelope.header))
    # The id only finds the key; it is the signature that proves the author.
    author = find_author(envelope.key_id)
    if author is None:
        raise rejection(pb.KEY_UNKNOWN, "key_id", "a key of the roster", envelope.key_id[:16].hex())
    if not verify(author.key, KIND, envelope.header, envelope.signature):
        raise rejection(pb.SIGNATURE, "signature", f"one by {author.name}", "another, or other bytes signed")
    try:
        # Not before here: bytes of an unknown sender never reach the parser.
        header = parse(pb.Header(), envelope.header)
    except WireError as error:
        raise rejection(pb.HEADER_MALFORMED, "header", "a Header of this release", error) from None
    if header.protocol != PROTOCOL:
        raise rejection(pb.PROTOCOL, "protocol", PROTOCOL, header.protocol)
    # Logs and receipts show the name in the header: a client must not sign in the name of another.
    if header.author != author.name:
        raise rejection(pb.AUTHOR_MISMATCH, "author", author.name, header.author)
    # Sorted and each once: else a key could name two bodies, and two readers take different ones.
    keys = [part.key for part in header.parts]
    if len(keys) > MAX_PARTS or keys != sorted(set(keys)) or any(len(part.digest) != 32 for part in header.parts):
        raise rejection(
            pb.HEADER_MALFORMED, "parts", f"at most {MAX_PARTS} with digests, in order of their keys", keys[:4]
        )
    return header, author


def expect_fields(header: pb.Header, **values: object) -> None:
    """Check that fields of a header have these values.

    Raises:
        RejectionError: naming the first field that differs, with its reason from `FIELDS`.
    """
    for name, value in values.items():
        actual = getattr(header, name)
        if actual != value:
            raise rejection(FIELDS[name], name, display_value(value), display_value(actual))


FIELDS: Mapping[str, pb.Reason] = {
    "federation": pb.WRONG_FEDERATION,
    "run": pb.WRONG_RUN,
    "author": pb.AUTHOR_MISMATCH,
    "to": pb.AUTHOR_MISMATCH,
    "kind": pb.KIND_NOT_EXPECTED,
    "task": pb.KIND_NOT_EXPECTED,
    "round": pb.ROUND_DIFFERS,
    "recipe": pb.RECIPE_DIFFERS,
    "base": pb.BASE_DIFFERS,
    "state": pb.STATE_DIFFERS,
    "order": pb.ORDER_UNKNOWN,
    "epoch": pb.STALE_EPOCH,
    "nonce": pb.SIGNATURE,
    "build": pb.BUILD_DIFFERS,
}
"""Reason of the rejection if a field of a header is not as expected."""


def display_value(value: object) -> str:
    return value.hex()[:16] if isinstance(value, bytes) else repr(value)


def make_part(key: str, data: bytes | memoryview) -> pb.Part:
    return pb.Part(key=key, digest=sha256(data).digest(), num_bytes=len(data))


def assignment_subject(front: bytes, parts: Sequence[pb.Part]) -> tuple[int, str, bytes]:
    """Return round, base (hex) and state of an encoded assignment.

    The state is a digest of the server's state as this client sees it: with seeds that of their ledger; with adapters
    the digest over the sorted digests of the bodies that are sent.

    Raises:
        WireError: if it is no assignment.
    """
    assignment = parse(round_pb2.Assignment(), front)
    if assignment.verb == round_pb2.PROBE:
        return assignment.round, assignment.base, assignment.probe.state.digest
    if assignment.verb == round_pb2.DESCEND:
        return assignment.round, assignment.base, assignment.descend.probe.state.digest
    # Without the header's own part, which differs between clients; sorted, so that keys do not matter.
    bodies = b"".join(sorted(part.digest for part in parts if part.key))
    return assignment.round, assignment.base, sha256(bodies).digest()
