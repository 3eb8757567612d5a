"""The two messages of a round to bytes and back: headers of proto/fedtune/v1/round.proto beside tensor bodies."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import lru_cache
from typing import Any, TypeVar

from google.protobuf.message import DecodeError, Message

from fedtune.class_sums import ClassSums
from fedtune.errors import WireError
from fedtune.messages import (
    Assignment,
    ClientUpdate,
    DescendSeeds,
    LoraResult,
    Measured,
    Plan,
    Preference,
    ProbeSeeds,
    Proximal,
    Pruning,
    SumClasses,
    TailRank,
    Task,
    Term,
    Training,
    TrainLora,
)
from fedtune.number_formats import is_quantised
from fedtune.pruning.ranking import PruningSettings
from fedtune.tensors import Tensors
from fedtune.wire import class_sums, descend, personal, probe, seed_updates, settings
from fedtune.wire import tensors as bodies
from fedtune.wire.expect import LARGEST, MAX_COUNT, MAX_RANK, expect
from fedtune.wire.probe import choice
from fedtune.wire.v1 import round_pb2 as pb

MAX_HEADER_BYTES = 64 * 1024 + 256 * bodies.MAX_TENSORS
ALIGNMENT = 64
"""Bodies of an update start at a multiple of this, so that its tensors can be used where they lie."""

CHOICES: Mapping[str, Mapping[str, int]] = {
    "train": {"ab": pb.TRAIN_AB, "b": pb.TRAIN_B},
    "upload": {"factors": pb.UPLOAD_FACTORS, "difference": pb.UPLOAD_DIFFERENCE},
    "wire_dtype": {"fp32": pb.F32, "fp16": pb.F16, "bf16": pb.BF16, "int8": pb.I8, "int4": pb.I4},
}
"""The numbers of the values of a task's fields, which have the same names in the schema."""
PLAN_CHOICES: Mapping[str, Mapping[str, int]] = {
    "base_dtype": {"": pb.BASE_AS_RECIPE, "int8": pb.BASE_INT8, "nf4": pb.BASE_NF4},
    "view": {"whole": pb.VIEW_WHOLE, "deployed": pb.VIEW_DEPLOYED},
    "importance": {
        "": pb.IMPORTANCE_NONE,
        "gain": pb.IMPORTANCE_GAIN,
        "gradient": pb.IMPORTANCE_GRADIENT,
        "svd": pb.IMPORTANCE_SVD,
        "adalora": pb.IMPORTANCE_ADALORA,
    },
}
"""The same of a plan's fields."""

COMMON = frozenset(("verb", "method", "plan", "round", "base", "labels", "date"))
FIELDS: Mapping[int, frozenset[str]] = {
    pb.ADAPT: COMMON | {"seed", "settings", "down", "local", "surgery", "personal"},
    pb.PROBE: COMMON | {"seed", "probe", "down"},
    pb.DESCEND: COMMON | {"seed", "descend", "down"},
    pb.SCORE: COMMON | {"down", "score", "personal"},
    pb.SUM: COMMON | {"seed", "sum"},
}
"""The fields of an assignment, by verb."""

HEAD = "head"
"""Role of the tensors that come with tasks of seeds."""
OPTIONAL_PARTS = ("scores", "moments")
"""Of an update, in this order, and named as the fields of its result."""

MAX_RATIO = 0.875
"""A block keeps at least an eighth."""
# Each stage is a bitmap over the base that the client decodes.
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
    expect(header.num_bytes == len(body), f"a body of {header.num_bytes} bytes for {header.role!r}", len(body))
    expect(not header.deflated, f"the body of {header.role!r} as it is", "a deflated one")
    # The tensors' own checks first: they cost nothing beside hashing the body.
    tensors, digest = bodies.decode(header.tensors, body), bodies.digest(body)
    if digest != header.digest:
        raise WireError(f"{header.role!r}: expected a body of digest {header.digest.hex()!r}; got {digest.hex()!r}")
    return tensors


def blob_decoder() -> Callable[[pb.Blob, bytes], Tensors]:
    """Return a `decode_blob` that checks and decodes each body object once, as long as the decoder is kept.

    Many clients in one process receive the same body in their assignments.
    """
    cache: dict[int, tuple[pb.Blob, bytes, Tensors]] = {}

    def decode(header: pb.Blob, body: bytes) -> Tensors:
        # The header too: another message may describe the same bytes as other tensors.
        if id(body) not in cache or cache[id(body)][0] != header:
            cache[id(body)] = header, body, decode_blob(header, body)
        return cache[id(body)][2]

    return decode


def encode_assignment(assignment: Assignment, *, encode: Callable[[Tensors], Blob] = encode_blob) -> EncodedAssignment:
    """Return an assignment as header and bodies; one `blob_encoder` for a cohort encodes shared tensors once.

    Raises:
        WireError: if a tensor or a setting cannot travel.
    """
    plan, blobs = assignment.plan, dict[str, bytes]()
    header = pb.Assignment(method=assignment.method, seed=assignment.seed, round=assignment.round)
    header.labels.extend(assignment.labels)
    header.date = assignment.date
    header.plan.client = plan.client
    match assignment.task:
        case ProbeSeeds() as task:
            # Without the base: the digest of the state is taken over that of the base's manifest too.
            header.verb = pb.PROBE
            header.probe.CopyFrom(probe.to_message(task, plan.training))
            blobs |= _write_head(header, task.head, encode)
        case DescendSeeds() as task:
            header.verb = pb.DESCEND
            header.descend.CopyFrom(descend.to_message(task, plan.training))
            blobs |= _write_head(header, task.probe.head, encode)
        case SumClasses() as task:
            header.verb, header.base = pb.SUM, assignment.base
            header.sum.CopyFrom(class_sums.to_message(task, plan.training))
        case TrainLora() as task:
            header.verb, header.base = pb.ADAPT, assignment.base
            numbers: dict[str, Any] = {field: table[getattr(plan, field)] for field, table in PLAN_CHOICES.items()}
            numbers |= {"rank": plan.rank, "scale": plan.scale, "pruning": plan.ratio, "back": plan.back}
            header.plan.MergeFrom(pb.Plan(ranks=plan.ranks, **numbers))
            header.settings = settings.encode(plan.training)
            _write_task(header, task)
            # Sorted: a reader refuses roles in another order, so that one assignment has one encoding.
            for role in sorted(task.blobs):
                blob = encode(task.blobs[role])
                blobs[blob.digest] = blob.body
                header.down.append(blob.header)
                header.down[-1].role = role
    return EncodedAssignment(header.SerializeToString(), blobs)


def _write_head(
    header: pb.Assignment, head: Tensors, encode: Callable[[Tensors], Blob] = encode_blob
) -> Mapping[str, bytes]:
    """Write the head that takes the place of the base's, if there is one, and return its body by digest."""
    if not head:
        return {}
    blob = encode(head)
    header.down.append(blob.header)
    header.down[-1].role = HEAD
    return {blob.digest: blob.body}


def _head_from(message: pb.Assignment, decode: Callable[[pb.Blob], Tensors]) -> Tensors:
    roles = [blob.role for blob in message.down]
    expect(roles in ([], [HEAD]), f"the role {HEAD}, once, or none", roles)
    return decode(message.down[0]) if roles else {}


def _write_task(header: pb.Assignment, task: TrainLora) -> None:
    """Write what is no plan and no tensor of a task."""
    numbers: dict[str, Any] = {field: table[getattr(task, field)] for field, table in CHOICES.items()}
    header.local.CopyFrom(pb.LocalAdapter(a_key=task.a_key, rank_decay=1.0, **numbers))  # 1: without HetLoRA's term
    for term in task.terms:
        _write_term(header.local, term)
    if task.pruning is not None:
        header.surgery.CopyFrom(_pruning_to(task.pruning))
    if task.personal is not None:
        header.personal.CopyFrom(personal.to_message(task.personal))


def _write_term(local: pb.LocalAdapter, term: Term) -> None:
    match term:
        case TailRank(weight, decay):
            local.rank_penalty, local.rank_decay = weight, decay
        case Proximal(mu):
            local.proximal = mu
        case Preference(beta):
            local.preference_beta = beta


def decode_assignment(
    header: bytes, blobs: Mapping[str, bytes], *, decode: Callable[[pb.Blob, bytes], Tensors] = decode_blob
) -> Assignment:
    """Return the assignment; its tensors are read-only views of the bodies.

    One `blob_decoder` for many clients in one process decodes shared bodies once.

    Raises:
        WireError: if the header is malformed, or a body is missing or not the one that the header names.
    """
    return _assignment_from(header, lambda blob: decode(blob, body_of(blob, blobs)))


def decode_outline(header: bytes) -> Assignment:
    """Return the assignment of a header without its bodies: tensors with names and shapes, and zeros for entries.

    Raises:
        WireError: if the header is malformed.
    """
    return _assignment_from(header, outline_of)


def outline_of(blob: pb.Blob) -> Tensors:
    """Return the tensors that a blob describes, with zeros for its entries."""
    return bodies.outline(blob.tensors, blob.num_bytes)


def _assignment_from(header: bytes, decode: Callable[[pb.Blob], Tensors]) -> Assignment:
    message = parse(pb.Assignment(), header)
    task: Task
    match message.verb:
        case pb.PROBE:
            measured, training = probe.from_message(message.probe)
            task = replace(measured, head=_head_from(message, decode))
            plan = Plan(message.plan.client, rank=1, scale=1.0, training=training)
        case pb.DESCEND:
            moved, training = descend.from_message(message.descend)
            task = replace(moved, probe=replace(moved.probe, head=_head_from(message, decode)))
            plan = Plan(message.plan.client, rank=1, scale=1.0, training=training)
        case pb.SUM:
            task, training = class_sums.from_message(message.sum)
            plan = Plan(message.plan.client, rank=1, scale=1.0, training=training)
        case pb.ADAPT:
            plan, task = _plan_from(message), _lora_from(message, decode)
        case other:
            known = f"the verb ADAPT ({pb.ADAPT}), PROBE ({pb.PROBE}), DESCEND ({pb.DESCEND}) or SUM ({pb.SUM})"
            raise WireError(f"assignment: expected {known}; got {other}; update this client")
    check_fields(message)
    return Assignment(
        message.method,
        message.round,
        message.seed,
        plan,
        task,
        message.base,
        tuple(message.labels),
        day_of(message),
    )


def check_fields(message: pb.Assignment) -> None:
    """Refuse a message with fields of another verb than its own.

    Raises:
        WireError: if it has one.
    """
    own = FIELDS[message.verb]
    # Nothing reads them, and so no site holds them against its recipe: the next release may read them.
    strange = [field.name for field, _ in message.ListFields() if field.name not in own]
    expect(not strange, f"the fields of the verb {pb.Verb.Name(message.verb)}", ", ".join(strange))
    if message.verb != pb.ADAPT:
        alone = message.plan == pb.Plan(client=message.plan.client)
        expect(alone, "a plan that names a client, and nothing else", "numbers beside it")


def day_of(message: pb.Assignment) -> str:
    """Return the day that an assignment names; empty if it names none.

    Raises:
        WireError: if it is no day.
    """
    try:
        is_day = not message.date or date.fromisoformat(message.date).isoformat() == message.date
    except ValueError:
        is_day = False
    expect(is_day, 'a day, such as "2026-11-29"', message.date[:40])
    return message.date


def _plan_from(message: pb.Assignment) -> Plan:
    plan, scaled = message.plan, 0 < message.plan.scale <= LARGEST
    ranked = 1 <= plan.rank <= MAX_RANK
    expect(
        ranked and scaled,
        f"rank >= 1, at most {MAX_RANK}, and scale > 0 in float32",
        f"rank {plan.rank}, scale {plan.scale}",
    )
    expect(0 <= plan.pruning <= MAX_RATIO, f"a pruning ratio from 0 to {MAX_RATIO}", plan.pruning)
    expect(0 <= plan.back <= MAX_RATIO, f"a share from 0 to {MAX_RATIO} left out of the backward pass", plan.back)
    # How many there must be only the base can say, which has at most so many modules as a message has tensors.
    ranks, most = tuple(plan.ranks), bodies.MAX_TENSORS
    within = not ranks or (len(ranks) <= most and max(ranks) == plan.rank)
    got = f"{len(ranks)}, the largest {max(ranks, default=0)}"
    expect(within, f"at most {most} ranks of modules, the largest being the plan's {plan.rank}", got)
    named: dict[str, Any] = {field: choice(table, getattr(plan, field), field) for field, table in PLAN_CHOICES.items()}
    training = _training(message.settings)
    return Plan(plan.client, plan.rank, plan.scale, training, plan.pruning, ranks, plan.back, **named)


def _lora_from(message: pb.Assignment, decode: Callable[[pb.Blob], Tensors]) -> TrainLora:
    local, roles = message.local, [blob.role for blob in message.down]
    expect(roles == sorted(set(roles)), "each role once, in order", roles)
    names: dict[str, Any] = {field: choice(table, getattr(local, field), field) for field, table in CHOICES.items()}
    tensors = {blob.role: decode(blob) for blob in message.down}
    # NaN is unequal to 0 and to 1, so it gets to the checks.
    plain = local.rank_penalty == 0 and local.rank_decay == 1 and local.proximal == 0
    plain = plain and local.preference_beta == 0
    task = TrainLora(local.a_key, terms=() if plain else _terms_from(local), blobs=tensors, **names)
    if message.HasField("personal"):
        task = replace(task, personal=personal.from_message(message.personal))
    return replace(task, pruning=_pruning_from(message.surgery)) if message.HasField("surgery") else task


def _terms_from(local: pb.LocalAdapter) -> tuple[Term, ...]:
    tail = 0 <= local.rank_penalty <= LARGEST and 0 < local.rank_decay <= 1
    got = f"{local.rank_penalty} and {local.rank_decay}"
    expect(tail, "rank_penalty >= 0 and rank_decay in (0, 1]", got)
    expect(0 <= local.proximal <= LARGEST, "proximal >= 0 in float32", local.proximal)
    terms: list[Term] = []
    if local.rank_penalty > 0 or local.rank_decay < 1:
        terms.append(TailRank(local.rank_penalty, local.rank_decay))
    if local.proximal > 0:
        terms.append(Proximal(local.proximal))
    expect(0 <= local.preference_beta <= LARGEST, "preference_beta >= 0 in float32", local.preference_beta)
    if local.preference_beta > 0:
        terms.append(Preference(local.preference_beta))
    return tuple(terms)


def _pruning_to(pruning: Pruning) -> pb.Surgery:
    return pb.Surgery(
        settings=settings.encode(pruning.settings),
        stages=pruning.stages,
        before=pruning.previous,
        wanted=pruning.scores_requested,
        moments=pruning.moments_requested,
        whole=pruning.whole_requested,
    )


def _pruning_from(message: pb.Surgery) -> Pruning:
    """Return how to prune; whether its bitmaps are of the base can only be checked against the base."""
    few = len(message.stages) <= MAX_STAGES and all(message.stages)
    expect(few, f"at most {MAX_STAGES} stages, none empty", len(message.stages))
    return Pruning(
        settings=_pruning_settings(message.settings),
        stages=tuple(message.stages),
        previous=message.before,
        scores_requested=message.wanted,
        moments_requested=message.moments,
        whole_requested=message.whole,
    )


def encode_update(update: ClientUpdate) -> bytes:
    """Return an update as header length, header, zero bytes up to `ALIGNMENT`, and the bodies; of seeds as one header.

    Raises:
        WireError: if a tensor cannot travel.
    """
    if isinstance(update.result, ClassSums):
        return class_sums.update_to_bytes(update, update.result)
    if not isinstance(update.result, LoraResult):
        return seed_updates.to_message(update, update.result).SerializeToString()
    result, bodies_in_order = update.result, list[bytes]()
    # Of the same names; None leaves a field out.
    header = pb.ClientUpdate(examples=update.num_examples, measured=pb.Measured(**vars(update.measured)))
    header.client, header.round, header.base = update.client, update.round, result.base
    header.kept, header.mask = result.structure_digest, result.mask
    number: Any = PLAN_CHOICES["base_dtype"][result.base_dtype]
    header.MergeFrom(pb.ClientUpdate(base_format=number, codes=result.codes))
    personal.write_trace(header, result.personal)
    parts = {"tensors": result.tensors, "saved": result.saved}
    parts |= {role: part for role in OPTIONAL_PARTS if (part := getattr(result, role))}
    for role, tensors in parts.items():
        specs, body = bodies.encode(tensors)
        # No digest: the link's signed digest of the whole update covers the bodies.
        part = header.parts.add(role=role, num_bytes=len(body), tensors=specs)
        if is_quantised(tensors) and len(deflated := bodies.deflate(body)) < len(body):
            part.deflated, body = len(deflated), deflated
        bodies_in_order.append(body)
    # The names of a small model's codes would be as many bytes as the codes: whole words repeat in them.
    if is_quantised(result.tensors):
        header.deflated_parts = zlib.compress(
            pb.ClientUpdate(parts=header.parts).SerializeToString(), wbits=-zlib.MAX_WBITS
        )
        header.ClearField("parts")
    # The length comes first, so that a reader takes no byte of a body for the header.
    front = header.SerializeToString()
    front = len(front).to_bytes(4, "little") + front
    return b"".join([front, bytes(-len(front) % ALIGNMENT), *bodies_in_order])


def decode_update(data: bytes, *, client: str, limit_bytes: int, task: type[Task] = TrainLora) -> ClientUpdate:
    """Return the update of an authenticated client; its tensors are read-only views of `data`.

    Numbers are taken as they are, NaN too: whether they may be aggregated is for the admission to say. The task is the
    one that the client was given.

    Raises:
        WireError: names the client; if `data` is longer than `limit_bytes`, malformed, or of another client.
    """
    try:
        # Before anything is parsed: what a client sends must not decide how much memory the server takes.
        expect(len(data) <= limit_bytes, f"an update of at most {limit_bytes} bytes", len(data))
        if task is SumClasses:
            return class_sums.update_from_message(parse(pb.SumUpdate(), bytes(data), most=limit_bytes), client=client)
        if task is not TrainLora:
            return seed_updates.from_message(parse(pb.ProbeUpdate(), bytes(data)), client=client)
        return _update(memoryview(data), client, limit_bytes)
    except WireError as error:
        raise WireError(f"{client}: {error}") from None


def _update(data: memoryview, client: str, limit_bytes: int) -> ClientUpdate:
    length = int.from_bytes(data[:4], "little")
    start = -(-(4 + length) // ALIGNMENT) * ALIGNMENT
    # Zero bytes, so that one update has one encoding: its digest names it in the journal.
    padded = start <= len(data) and not any(data[4 + length : start])
    expect(padded, f"a header of {length} bytes, padded by zeros to {start}", f"{len(data)} bytes in all")
    header = parse(pb.ClientUpdate(), bytes(data[4 : 4 + length]))
    expect(header.client == client, "an update of this client", f"one of {header.client!r}")
    parts = parts_of(header)
    roles = [part.role for part in parts]
    known = roles[:2] == ["tensors", "saved"] and roles[2:] == [role for role in OPTIONAL_PARTS if role in roles[2:]]
    expect(known, "the parts tensors and saved, then scores and moments where they are wanted", roles)
    measured = header.measured
    # NaN fails both: a time or weight that no number is would spread through the planner's means.
    expect(0 <= measured.seconds <= LARGEST, "a time of at least 0 s", measured.seconds)
    expect(0 <= measured.importance <= LARGEST, "an importance of at least 0", measured.importance)
    expect(0 <= measured.joules <= LARGEST, "an energy of at least 0 J", measured.joules)
    sizes = (header.examples, measured.peak_bytes, measured.tokens, measured.side_tokens, measured.skipped_steps)
    expect(max(sizes) < MAX_COUNT, f"examples, bytes, tokens and steps below {MAX_COUNT}", max(sizes))
    expect(len(header.kept) in (0, 32), "a digest of 32 bytes of what was kept", len(header.kept))
    cut = dict(zip(roles, _cut(parts, data[start:], limit_bytes), strict=True))
    base_format: Any = choice(PLAN_CHOICES["base_dtype"], header.base_format, "base_format")
    result = LoraResult(
        base=header.base,
        structure_digest=header.kept,
        mask=header.mask,
        base_dtype=base_format,
        codes=header.codes,
        personal=personal.read_trace(header),
        **cut,
    )
    most = bodies.MAX_TENSORS
    expect(len(measured.module_importance) <= most, f"at most {most} shares", len(measured.module_importance))
    shares = {"module_importance": tuple(measured.module_importance)}
    numbers = Measured(**{field.name: value for field, value in measured.ListFields()} | shares)
    return ClientUpdate(header.client, header.round, header.examples, result, numbers)


def parts_of(header: pb.ClientUpdate) -> Sequence[pb.Blob]:
    """Return the parts of an update's header.

    Raises:
        WireError: if it has them twice, or what is deflated is no message of parts alone.
    """
    if not header.deflated_parts:
        return header.parts
    expect(not header.parts, "the parts once", "them as they are and deflated")
    inner = parse(pb.ClientUpdate(), bodies.inflate_up_to(header.deflated_parts, MAX_HEADER_BYTES, "parts"))
    expect(inner == pb.ClientUpdate(parts=inner.parts), "nothing but parts", "other fields beside them")
    return inner.parts


def _cut(parts: Sequence[pb.Blob], body: memoryview, limit_bytes: int) -> Iterator[Tensors]:
    """Yield the tensors of each part; the parts fill the body."""
    sizes = [part.deflated or part.num_bytes for part in parts]
    expect(sum(sizes) == len(body), f"bodies of {sizes} bytes", f"{len(body)} in all")
    # A few bytes may inflate to a thousand times as many: what they say that they become is held to the same limit.
    inflated = sum(part.num_bytes for part in parts)
    expect(inflated <= limit_bytes, f"bodies of at most {limit_bytes} bytes once inflated", inflated)
    # Views, not copies: an update of many gigabytes is held once.
    for part, size in zip(parts, sizes, strict=True):
        plain = bodies.inflate(body[:size], part.num_bytes, part.role) if part.deflated else body[:size]
        yield bodies.decode(part.tensors, plain)
        body = body[size:]


def body_of(blob: pb.Blob, blobs: Mapping[str, bytes]) -> bytes:
    body = blobs.get(blob.digest.hex())
    if body is None:
        raise WireError(f"{blob.role!r}: expected a body of digest {blob.digest.hex()!r}; got only {sorted(blobs)}")
    return body


def parse(message: AnyMessage, data: bytes, *, most: int = MAX_HEADER_BYTES) -> AnyMessage:
    """Return the message with `data` parsed into it; fields that this release does not know are refused."""
    expect(len(data) <= most, f"a header of at most {most} bytes", len(data))
    name = type(message).__name__
    try:
        message.ParseFromString(data)
    except DecodeError:
        raise WireError(f"expected a serialised {name}; got {len(data)} bytes that are none") from None
    known = message.ByteSize()
    message.DiscardUnknownFields()
    # An instruction that is not understood must not be skipped in silence.
    whole = message.ByteSize() == known
    expect(whole, f"the fields of {name} of this release", "others too", hint="update this side")
    return message


@lru_cache(maxsize=64)
def _training(data: bytes) -> Training:
    # Cached, because a fleet has few different settings and receives them with every assignment.
    training = settings.decode(data, Training)
    # A recipe's word for what the server measures: orders state what it has chosen.
    expect(training.learning_rate != "auto", "settings.learning_rate: a number", "auto")
    return training


@lru_cache(maxsize=8)
def _pruning_settings(data: bytes) -> PruningSettings:
    return settings.decode(data, PruningSettings)
