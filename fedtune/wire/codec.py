"""The two messages of a round to bytes and back: headers of proto/fedtune/v1/round.proto beside tensor bodies."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Literal, TypeVar

from google.protobuf.message import DecodeError, Message

from fedtune.errors import WireError
from fedtune.messages import (
    Assignment,
    ClientUpdate,
    LoraResult,
    Measured,
    Plan,
    ProbeResult,
    ProbeSeeds,
    Proximal,
    Pruning,
    TailRank,
    Task,
    Term,
    Training,
    TrainLora,
    WireDtype,
)
from fedtune.pruning.ranking import PruningSettings
from fedtune.tensors import Tensors
from fedtune.wire import probe, settings
from fedtune.wire import tensors as bodies
from fedtune.wire.probe import choice
from fedtune.wire.v1 import round_pb2 as pb

MAX_HEADER_BYTES = 64 * 1024 + 256 * bodies.MAX_TENSORS
ALIGNMENT = 64
"""Bodies of an update start at a multiple of this, so that its tensors can be used where they lie."""

TRAIN: Mapping[Literal["ab", "b"], pb.Train] = {"ab": pb.TRAIN_AB, "b": pb.TRAIN_B}
UPLOAD: Mapping[Literal["factors", "difference"], pb.Upload] = {
    "factors": pb.UPLOAD_FACTORS,
    "difference": pb.UPLOAD_DIFFERENCE,
}
WIRE_DTYPE: Mapping[WireDtype, pb.DType] = {"fp32": pb.F32, "fp16": pb.F16, "bf16": pb.BF16}

MAX_RATIO = 0.875
"""A block keeps at least an eighth."""
MAX_STAGES = 64

AnyMessage = TypeVar("AnyMessage", bound=Message)


@dataclass(frozen=True)
class Blob:
    """Tensors as they travel: a body, found by its digest, and what describes it in a header."""

    digest: str
    """SHA-256 of the body (hex)."""
    body: bytes
    header: pb.Blob
    """Without a role, which the message gives."""


@dataclass(frozen=True)
class EncodedAssignment:
    """An assignment as it travels: its own header, and bodies that many clients may share."""

    header: bytes
    blobs: Mapping[str, bytes]
    """Bodies by digest (hex)."""


def encode_blob(tensors: Tensors) -> Blob:
    """Return the tensors as one body with its digest.

    Raises:
        WireError: if a tensor cannot travel; see `wire.tensors.encode`.
    """
    specs, body = bodies.encode(tensors)
    digest = bodies.digest(body)
    return Blob(digest.hex(), body, pb.Blob(digest=digest, num_bytes=len(body), tensors=specs))


def blob_encoder() -> Callable[[Tensors], Blob]:
    """Return an `encode_blob` that encodes each mapping object once, as long as the encoder is kept.

    A server state that goes to a whole cohort is one mapping in many assignments.
    """
    cache: dict[int, tuple[Tensors, Blob]] = {}  # holds the mapping too, so that no other one takes over its id

    def encode(tensors: Tensors) -> Blob:
        if id(tensors) not in cache:
            cache[id(tensors)] = tensors, encode_blob(tensors)
        return cache[id(tensors)][1]

    return encode


def decode_blob(header: pb.Blob, body: bytes) -> Tensors:
    """Return the tensors of a body as read-only views of it.

    Raises:
        WireError: if length, digest or tensors of the body are not those that the header names.
    """
    if header.num_bytes != len(body):
        raise WireError(f"{header.role!r}: expected a body of {header.num_bytes} bytes; got {len(body)}")
    tensors = bodies.decode(header.tensors, body)
    digest = bodies.digest(body)
    if digest != header.digest:
        raise WireError(f"{header.role!r}: expected a body of digest {header.digest.hex()!r}; got {digest.hex()!r}")
    return tensors


def blob_decoder() -> Callable[[pb.Blob, bytes], Tensors]:
    """Return a `decode_blob` that checks and decodes each body object once, as long as the decoder is kept.

    Many clients in one process receive the same body in their assignments.
    """
    cache: dict[int, tuple[pb.Blob, bytes, Tensors]] = {}

    def decode(header: pb.Blob, body: bytes) -> Tensors:
        if id(body) not in cache or cache[id(body)][0] != header:
            cache[id(body)] = header, body, decode_blob(header, body)
        return cache[id(body)][2]

    return decode


def encode_assignment(assignment: Assignment, *, encode: Callable[[Tensors], Blob] = encode_blob) -> EncodedAssignment:
    """Return an assignment as header and bodies; one `blob_encoder` for a cohort encodes shared tensors once.

    Raises:
        WireError: if a tensor or a setting cannot travel.
    """
    plan = assignment.plan
    header = pb.Assignment(
        method=assignment.method, plan=pb.Plan(client=plan.client), seed=assignment.seed, round=assignment.round
    )
    match assignment.task:
        case ProbeSeeds() as task:
            # Without the base: the digest of the state is taken over that of the base's manifest too.
            header.verb = pb.PROBE
            header.probe.CopyFrom(probe.to_message(task, plan.training))
            return EncodedAssignment(header.SerializeToString(), {})
        case TrainLora() as task:
            header.verb = pb.ADAPT
            header.plan.MergeFrom(pb.Plan(rank=plan.rank, scale=plan.scale, pruning=plan.ratio))
            header.settings = settings.encode(plan.training)
            header.base = assignment.base
            header.local.CopyFrom(_local_to(task))
            if task.pruning is not None:
                header.surgery.CopyFrom(_pruning_to(task.pruning))
    blobs = {}
    for role in sorted(task.blobs):
        blob = encode(task.blobs[role])
        blobs[blob.digest] = blob.body
        header.down.append(blob.header)
        header.down[-1].role = role
    return EncodedAssignment(header.SerializeToString(), blobs)


def decode_assignment(
    header: bytes, blobs: Mapping[str, bytes], *, decode: Callable[[pb.Blob, bytes], Tensors] = decode_blob
) -> Assignment:
    """Return the assignment; its tensors are read-only views of the bodies.

    One `blob_decoder` for many clients in one process decodes shared bodies once.

    Raises:
        WireError: if the header is malformed, or a body is missing or not the one that the header names.
    """
    message = parse(pb.Assignment(), header)
    task: Task
    if message.verb == pb.PROBE:
        task, training = probe.from_message(message.probe)
        plan = Plan(message.plan.client, rank=1, scale=1.0, training=training)
    elif message.verb == pb.ADAPT:
        plan, task = _plan_from(message), _lora_from(message, blobs, decode)
    else:
        raise WireError(
            f"assignment: expected the verb ADAPT ({pb.ADAPT}) or PROBE ({pb.PROBE}); got {message.verb}; "
            "update this client"
        )
    return Assignment(message.method, message.round, message.seed, plan, task, message.base)


def _plan_from(message: pb.Assignment) -> Plan:
    plan = message.plan
    if plan.rank < 1 or not (math.isfinite(plan.scale) and plan.scale > 0):
        raise WireError(f"assignment: expected rank >= 1 and scale > 0; got rank {plan.rank}, scale {plan.scale}")
    if not 0 <= plan.pruning <= MAX_RATIO:
        raise WireError(f"assignment: expected a pruning ratio from 0 to {MAX_RATIO}; got {plan.pruning}")
    return Plan(plan.client, plan.rank, plan.scale, _training(message.settings), plan.pruning)


def _lora_from(
    message: pb.Assignment, blobs: Mapping[str, bytes], decode: Callable[[pb.Blob, bytes], Tensors]
) -> TrainLora:
    roles = [blob.role for blob in message.down]
    if roles != sorted(set(roles)):
        raise WireError(f"assignment: expected each role once, in order; got {roles}")
    local = message.local
    return TrainLora(
        a_key=local.a_key,
        train=choice(TRAIN, local.train, "train"),
        upload=choice(UPLOAD, local.upload, "upload"),
        wire_dtype=choice(WIRE_DTYPE, local.wire_dtype, "wire_dtype"),
        terms=_terms_from(local),
        blobs={blob.role: decode(blob, body_of(blob, blobs)) for blob in message.down},
        pruning=_pruning_from(message.surgery) if message.HasField("surgery") else None,
    )


def _local_to(task: TrainLora) -> pb.LocalAdapter:
    local = pb.LocalAdapter(
        a_key=task.a_key,
        train=TRAIN[task.train],
        upload=UPLOAD[task.upload],
        wire_dtype=WIRE_DTYPE[task.wire_dtype],
        rank_decay=1.0,  # without the term
    )
    for term in task.terms:
        match term:
            case TailRank(weight, decay):
                local.rank_penalty, local.rank_decay = weight, decay
            case Proximal(mu):
                local.proximal = mu
    return local


def _terms_from(local: pb.LocalAdapter) -> tuple[Term, ...]:
    if not (0 <= local.rank_penalty < math.inf and 0 < local.rank_decay <= 1):
        raise WireError(
            "assignment: expected rank_penalty >= 0 and rank_decay in (0, 1]; "
            f"got {local.rank_penalty} and {local.rank_decay}"
        )
    if not 0 <= local.proximal < math.inf:
        raise WireError(f"assignment: expected proximal >= 0; got {local.proximal}")
    terms: list[Term] = []
    if local.rank_penalty > 0 or local.rank_decay < 1:
        terms.append(TailRank(local.rank_penalty, local.rank_decay))
    if local.proximal > 0:
        terms.append(Proximal(local.proximal))
    return tuple(terms)


def _pruning_to(pruning: Pruning) -> pb.Surgery:
    return pb.Surgery(
        settings=settings.encode(pruning.settings),
        stages=pruning.stages,
        before=pruning.previous,
        wanted=pruning.scores_requested,
    )


def _pruning_from(message: pb.Surgery) -> Pruning:
    """Return how to prune; whether its bitmaps are of the base can only be checked against the base."""
    if len(message.stages) > MAX_STAGES or not all(message.stages):
        raise WireError(f"assignment: expected at most {MAX_STAGES} stages, none empty; got {len(message.stages)}")
    return Pruning(
        settings=_pruning_settings(message.settings),
        stages=tuple(message.stages),
        previous=message.before,
        scores_requested=message.wanted,
    )


def encode_update(update: ClientUpdate) -> bytes:
    """Return an update as header length, header, zero bytes up to `ALIGNMENT`, and the bodies; a probe's as one header.

    Raises:
        WireError: if a tensor cannot travel.
    """
    if isinstance(update.result, ProbeResult):
        return probe.update_to_message(update, update.result).SerializeToString()
    result = update.result
    header = pb.ClientUpdate(
        examples=update.num_examples,
        measured=pb.Measured(**asdict(update.measured)),  # of the same names; None leaves a field out
        client=update.client,
        round=update.round,
        base=result.base,
        kept=result.structure_digest,
        mask=result.mask,
    )
    parts = []
    more = [("scores", result.scores)] if result.scores else []
    for role, tensors in (("tensors", result.tensors), ("saved", result.saved), *more):
        specs, body = bodies.encode(tensors)
        parts.append(body)
        header.parts.add(role=role, num_bytes=len(body), tensors=specs)
    front = header.SerializeToString()
    front = len(front).to_bytes(4, "little") + front
    return b"".join([front, bytes(-len(front) % ALIGNMENT), *parts])


def decode_update(data: bytes, *, client: str, limit_bytes: int, task: type[Task] = TrainLora) -> ClientUpdate:
    """Return the update of an authenticated client; its tensors are read-only views of `data`.

    Numbers are taken as they are, NaN too: whether they may be aggregated is for the admission to say. The task is the
    one that the client was given.

    Raises:
        WireError: names the client; if `data` is longer than `limit_bytes`, malformed, or of another client.
    """
    try:
        if len(data) > limit_bytes:
            raise WireError(f"expected an update of at most {limit_bytes} bytes; got {len(data)}")
        if task is ProbeSeeds:
            return probe.update_from_message(parse(pb.ProbeUpdate(), bytes(data)), client=client)
        return _update(memoryview(data), client)
    except WireError as error:
        raise WireError(f"{client}: {error}") from None


def _update(data: memoryview, client: str) -> ClientUpdate:
    length = int.from_bytes(data[:4], "little")
    start = -(-(4 + length) // ALIGNMENT) * ALIGNMENT
    if start > len(data) or any(data[4 + length : start]):
        raise WireError(
            f"expected a header of {length} bytes, padded by zeros to {start}; got {len(data)} bytes in all"
        )
    header = parse(pb.ClientUpdate(), bytes(data[4 : 4 + length]))
    if header.client != client:
        raise WireError(f"expected an update of this client; got one of {header.client!r}")
    if [part.role for part in header.parts] not in (["tensors", "saved"], ["tensors", "saved", "scores"]):
        roles = [part.role for part in header.parts]
        raise WireError(f"expected the parts tensors and saved, and scores where they are wanted; got {roles}")
    sent, saved, *more = _cut(header.parts, data[start:])
    measured = header.measured
    if not 0 <= measured.seconds < math.inf:
        raise WireError(f"expected a time of at least 0 s; got {measured.seconds}")
    if not 0 <= measured.importance < math.inf:
        raise WireError(f"expected an importance of at least 0; got {measured.importance}")
    if len(header.kept) not in (0, 32):
        raise WireError(f"expected a digest of 32 bytes of what was kept; got {len(header.kept)}")
    return ClientUpdate(
        client=header.client,
        round=header.round,
        num_examples=header.examples,
        result=LoraResult(
            tensors=sent,
            saved=saved,
            base=header.base,
            structure_digest=header.kept,
            mask=header.mask,
            scores=more[0] if more else {},
        ),
        measured=Measured(**{field.name: value for field, value in measured.ListFields()}),
    )


def _cut(parts: Sequence[pb.Blob], body: memoryview) -> Iterator[Tensors]:
    """Yield the tensors of each part; the parts fill the body."""
    if sum(part.num_bytes for part in parts) != len(body):
        raise WireError(f"expected bodies of {[part.num_bytes for part in parts]} bytes; got {len(body)} in all")
    for part in parts:
        yield bodies.decode(part.tensors, body[: part.num_bytes])
        body = body[part.num_bytes :]


def body_of(blob: pb.Blob, blobs: Mapping[str, bytes]) -> bytes:
    body = blobs.get(blob.digest.hex())
    if body is None:
        raise WireError(f"{blob.role!r}: expected a body of digest {blob.digest.hex()!r}; got only {sorted(blobs)}")
    return body


def parse(message: AnyMessage, data: bytes) -> AnyMessage:
    """Return the message with `data` parsed into it; fields that this release does not know are refused."""
    if len(data) > MAX_HEADER_BYTES:
        raise WireError(f"expected a header of at most {MAX_HEADER_BYTES} bytes; got {len(data)}")
    name = type(message).__name__
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise WireError(f"expected a serialised {name}; got {len(data)} bytes that are none") from None
    known = message.ByteSize()
    message.DiscardUnknownFields()
    # An instruction that is not understood must not be skipped in silence.
    if message.ByteSize() != known:
        raise WireError(f"expected the fields of {name} of this release; got others too; update this side")
    return message


@lru_cache(maxsize=64)
def _training(data: bytes) -> Training:
    # Cached, because a fleet has few different settings and receives them with every assignment.
    return settings.decode(data, Training)


@lru_cache(maxsize=8)
def _pruning_settings(data: bytes) -> PruningSettings:
    return settings.decode(data, PruningSettings)
