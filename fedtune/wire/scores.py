"""The request to score a global model, and a client's scores, to bytes and back, every number checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from fedtune.directions.space import MAX_ACCUMULATORS
from fedtune.messages import ClientScores, Preference, ScoreRequest
from fedtune.tensors import Tensors
from fedtune.wire import personal
from fedtune.wire.codec import (
    Blob,
    EncodedAssignment,
    body_of,
    check_fields,
    day_of,
    decode_blob,
    encode_blob,
    outline_of,
    parse,
)
from fedtune.wire.expect import LARGEST, expect
from fedtune.wire.v1 import round_pb2 as pb

ROLES = ("global", "saved")
MAX_LEDGER_BYTES = 4 * MAX_ACCUMULATORS + 32 * 1024
"""Every number in 32 bits, and what stands before them."""
MAX_METRICS = 32
MAX_SCORES_BYTES = 16 * 1024
"""Of an encoded answer."""


def encode_score_request(
    request: ScoreRequest, *, encode: Callable[[Tensors], Blob] = encode_blob
) -> EncodedAssignment:
    """Return a request as header and bodies; one `blob_encoder` for all clients encodes shared tensors once.

    Raises:
        WireError: if a tensor cannot travel.
    """
    header = pb.Assignment(verb=pb.SCORE, method=request.method, round=request.round, base=request.base)
    header.labels.extend(request.labels)
    header.date = request.date
    header.plan.client = request.client
    score = pb.Score(examples=request.examples, batch=request.batch, ledger=request.ledger, trainable=request.trainable)
    if request.preference is not None:
        score.preference_beta = request.preference.beta
    header.score.CopyFrom(score)
    personal.write_request(header, request.personal)
    bodies = dict[str, bytes]()
    # Sorted, as in an assignment: one request has one encoding.
    for role in sorted(request.blobs):
        blob = encode(request.blobs[role])
        bodies[blob.digest] = blob.body
        header.down.append(blob.header)
        header.down[-1].role = role
    return EncodedAssignment(header.SerializeToString(), bodies)


def decode_score_request(header: bytes, blobs: Mapping[str, bytes]) -> ScoreRequest:
    """Return the request; its tensors are read-only views of the bodies.

    Raises:
        WireError: if the header is malformed, or a body is missing or not the one that the header names.
    """
    return _request_from(header, lambda blob: decode_blob(blob, body_of(blob, blobs)))


def score_request_outline(header: bytes) -> ScoreRequest:
    """Return the request of a header whose bodies are not here: tensors with names and shapes, and zeros for entries.

    Raises:
        WireError: if the header is malformed.
    """
    return _request_from(header, outline_of)


def _request_from(header: bytes, decode: Callable[[pb.Blob], Tensors]) -> ScoreRequest:
    message = parse(pb.Assignment(), header)
    expect(message.verb == pb.SCORE, f"the verb SCORE ({pb.SCORE})", message.verb, hint="update this client")
    check_fields(message)
    score, roles = message.score, [blob.role for blob in message.down]
    expect(roles == sorted(set(roles) & set(ROLES)), f"roles of {', '.join(ROLES)}, each once and in order", roles)
    expect(1 <= score.batch < 2**31, "a batch of at least 1", score.batch)
    expect(len(score.ledger) <= MAX_LEDGER_BYTES, f"a ledger of at most {MAX_LEDGER_BYTES} bytes", len(score.ledger))
    ordinals = list(score.trainable)
    # In order and each once: a tensor that was moved twice would be another model.
    expect(ordinals == sorted(set(ordinals)), "ordinals in rising order", ordinals[:8])
    expect(bool(score.ledger) or not ordinals, "ordinals beside a ledger alone", ordinals[:8])
    beta = score.preference_beta
    expect(0 <= beta <= LARGEST, "preference_beta >= 0 in float32", beta)
    return ScoreRequest(
        client=message.plan.client,
        method=message.method,
        round=message.round,
        base=message.base,
        batch=score.batch,
        examples=score.examples,
        blobs={blob.role: decode(blob) for blob in message.down},
        ledger=score.ledger,
        trainable=tuple(ordinals),
        labels=tuple(message.labels),
        date=day_of(message),
        preference=Preference(beta) if beta > 0 else None,
        personal=personal.read_request(message),
    )


def encode_scores(scores: ClientScores) -> bytes:
    """Return a client's scores as bytes."""
    message = pb.ScoreUpdate(client=scores.client, round=scores.round, base=scores.base, seconds=scores.seconds)
    message.metrics.update({name: float(value) for name, value in scores.metrics.items()})
    message.personal.update({name: float(value) for name, value in scores.personal.items()})
    # A map has no order of its own: one answer is to have one encoding.
    return message.SerializeToString(deterministic=True)


def decode_scores(data: bytes | memoryview, *, client: str) -> ClientScores:
    """Return the scores of an authenticated client; whether they may be used is for the admission to say.

    Raises:
        WireError: if they are malformed, or of another client.
    """
    expect(len(data) <= MAX_SCORES_BYTES, f"{client}: scores of at most {MAX_SCORES_BYTES} bytes", len(data))
    message = parse(pb.ScoreUpdate(), bytes(data))
    expect(message.client == client, f"scores of {client!r}", f"some of {message.client[:80]!r}")
    expect(0 <= message.seconds <= LARGEST, f"{client}: a time of at least 0 s", message.seconds)
    expect(len(message.metrics) <= MAX_METRICS, f"{client}: at most {MAX_METRICS} metrics", len(message.metrics))
    expect(len(message.personal) <= MAX_METRICS, f"{client}: at most {MAX_METRICS} metrics", len(message.personal))
    metrics, own = (dict(sorted(part.items())) for part in (message.metrics, message.personal))
    return ClientScores(client, message.round, message.base, metrics, message.seconds, own)
