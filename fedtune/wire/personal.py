"""A client's personal model as the messages of a round speak of it: settings down, two short digests up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fedtune.messages import Personal, PersonalRequest, PersonalTrace, Training
from fedtune.wire import settings
from fedtune.wire.expect import LARGEST, MAX_COUNT, expect
from fedtune.wire.probe import choice
from fedtune.wire.v1 import round_pb2 as pb

KINDS: Mapping[str, int] = {
    "ditto": pb.DITTO,
    "pfedme": pb.PFEDME,
    "fedrep": pb.FEDREP,
    "share-a": pb.SHARE_A,
    "fedbn": pb.FEDBN,
    "finetune": pb.FINETUNE,
}
TRAIN: Mapping[str, int] = {"ab": pb.TRAIN_AB, "b": pb.TRAIN_B}
MAX_GLOBS = 256
DIGEST_BYTES = 8


def to_message(personal: Personal) -> pb.Personal:
    """Return the settings of a personal model as they travel, the defaults of its kind written out."""
    own = personal.in_full()
    numbers: dict[str, Any] = {"strength": own.strength, "rate": own.rate, "steps": own.steps}
    kind: Any = KINDS[own.kind]
    return pb.Personal(kind=kind, keep=own.keep, **{name: n for name, n in numbers.items() if n is not None})


def from_message(message: pb.Personal) -> Personal:
    """Return the settings that `to_message` wrote.

    Raises:
        WireError: if a number is outside its bounds, or a kind unknown.
    """
    kind: Any = choice(KINDS, message.kind, "personal.kind")
    few = len(message.keep) <= MAX_GLOBS and all(message.keep)
    expect(few, f"at most {MAX_GLOBS} globs, none empty", len(message.keep))
    # NaN fails both.
    expect(0 <= message.strength <= LARGEST, "a strength of at least 0 in float32", message.strength)
    rated = not message.HasField("rate") or 0 < message.rate <= LARGEST
    expect(rated, "a rate above 0 in float32", message.rate)
    expect(message.steps < MAX_COUNT, f"fewer than {MAX_COUNT} steps", message.steps)
    return Personal(
        kind=kind,
        keep=tuple(message.keep),
        strength=message.strength if message.HasField("strength") else None,
        rate=message.rate if message.HasField("rate") else None,
        steps=message.steps or None,
    )


def write_request(header: pb.Assignment, request: PersonalRequest | None) -> None:
    """Write which model of its own a client scores; nothing where it has none."""
    if request is None:
        return
    header.personal.CopyFrom(to_message(request.personal))
    if request.training is not None:
        train: Any = TRAIN[request.train]
        encoded = settings.encode(request.training)
        header.score.MergeFrom(pb.Score(settings=encoded, scale=request.scale, train=train, seed=request.seed))


def read_request(header: pb.Assignment) -> PersonalRequest | None:
    """Return which model of its own a client scores; None where it has none.

    Raises:
        WireError: if there are numbers that the model's kind does not read, or none that it does.
    """
    score = header.score
    stated = bool(score.settings or score.scale or score.train or score.seed)
    if not header.HasField("personal"):
        expect(not stated, "no training without a personal model", "one")
        return None
    request = PersonalRequest(from_message(header.personal))
    expect(stated != request.personal.has_state, "a training before a score with finetune alone", "another request")
    if not stated:
        return request
    training = settings.decode(score.settings, Training)
    known = training.learning_rate != "auto" and training.steps is not None
    expect(known, "settings with a learning rate and steps", "others")
    expect(0 < score.scale <= LARGEST, "a scale above 0 in float32", score.scale)
    train: Any = choice(TRAIN, score.train, "train")
    return replace(request, training=training, scale=score.scale, train=train, seed=score.seed)


def write_trace(header: pb.ClientUpdate, trace: PersonalTrace | None) -> None:
    """Write what an update says of the client's personal state; nothing where there is none."""
    if trace is not None:
        header.personal_before, header.personal_after = trace.before, trace.after


def read_trace(header: pb.ClientUpdate) -> PersonalTrace | None:
    """Return what an update says of the client's personal state; None where it says nothing.

    Raises:
        WireError: if a digest has another length.
    """
    has = [header.HasField("personal_before"), header.HasField("personal_after")]
    expect(has[0] == has[1], "both digests of a personal state, or none", "one")
    if not has[0]:
        return None
    lengths = len(header.personal_before), len(header.personal_after)
    expect(lengths[0] in (0, DIGEST_BYTES), f"{DIGEST_BYTES} bytes of a digest, or none", lengths[0])
    expect(lengths[1] == DIGEST_BYTES, f"{DIGEST_BYTES} bytes of a digest", lengths[1])
    return PersonalTrace(header.personal_before, header.personal_after)
