"""Signed replies of a client to its tasks: a header that repeats what was asked, and the parts that are small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedtune.link.client.jobs import Job
from fedtune.link.envelopes import PROTOCOL, UPDATE, build_version, seal
from fedtune.link.pki.identity import Identity
from fedtune.link.rejections import one_line
from fedtune.wire.v1 import link_pb2 as pb

MAX_INLINE_BYTES = 768 * 1024
"""Of all parts that travel within one `SubmitRequest`: below the 1 MiB that a server receives in one message."""
MAX_NOTE_CHARS = 500


def reply_header(identity: Identity, job: Job, parts: Sequence[pb.Part]) -> pb.Header:
    """Return the header of a reply; the server compares what it repeats of the task."""
    # Signed with the reply: an update that was trained for another round or state cannot be passed off as one of this.
    task = job.header
    return pb.Header(
        protocol=PROTOCOL,
        federation=task.federation,
        run=task.run,
        author=identity.name,
        kind=pb.ANSWER,
        round=task.round,
        recipe=task.recipe,
        base=task.base,
        state=task.state,
        order=job.task,
        parts=parts,
        build=build_version(),
    )


def sign_reply(
    identity: Identity, header: pb.Header, paths: Mapping[bytes, Path], *, inline_bytes: int
) -> pb.SubmitRequest:
    """Return a signed reply, with those of its parts that have at most `inline_bytes`; the others are pushed.

    Args:
        identity: that signs.
        header: of the reply.
        paths: files of the parts by digest.
        inline_bytes: the server's limit for one part.
    """
    inline, left = list[pb.Inline](), MAX_INLINE_BYTES
    for part in header.parts:
        # Neither the server's limit for a part nor the size of one message is exceeded; the rest is pushed.
        if part.num_bytes <= min(inline_bytes, left):
            inline.append(pb.Inline(digest=part.digest, data=paths[part.digest].read_bytes()))
            left -= part.num_bytes
    return pb.SubmitRequest(envelope=seal(header, identity.key), inline=inline)


def sign_decline(identity: Identity, job: Job, veto: pb.Veto, note: str) -> pb.SubmitRequest:
    """Return the signed statement that a task will not be done, and why."""
    header = reply_header(identity, job, parts=())
    header.kind = pb.DECLINE
    header.decline.CopyFrom(pb.Decline(veto=veto, note=one_line(note, longest=MAX_NOTE_CHARS)))
    return pb.SubmitRequest(envelope=seal(header, identity.key))


def is_decline(request: pb.SubmitRequest) -> bool:
    return pb.Header.FromString(request.envelope.header).kind == pb.DECLINE


def reply_bytes(request: pb.SubmitRequest) -> int:
    """Return the total bytes of a reply's parts."""
    return sum(part.num_bytes for part in pb.Header.FromString(request.envelope.header).parts)


def sample_statement(client: str, federation: str, data: bytes) -> tuple[bytes, int]:
    """Return the header of a reply as it would be signed, and the bytes that travel around its one part.

    For an owner who wants to see them before there is an identity, an order or a server: digests are of zeros, and the
    key is one of the moment.
    """
    part = pb.Part(key=UPDATE, digest=bytes(32), num_bytes=len(data))
    header = pb.Header(
        protocol=PROTOCOL,
        federation=federation,
        run="0" * 16,
        author=client,
        kind=pb.ANSWER,
        round=12,
        recipe=bytes(32),
        base=bytes(32),
        state=bytes(32),
        order=bytes(32),
        parts=[part],
        build=build_version(),
    )
    envelope = seal(header, Ed25519PrivateKey.generate())
    whole = pb.SubmitRequest(envelope=envelope, inline=[pb.Inline(digest=part.digest, data=data)])
    return envelope.header, len(whole.SerializeToString()) - len(data)
