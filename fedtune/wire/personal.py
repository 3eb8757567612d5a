"""A client's personal model as the messages of a round speak of it: settings down, two short digests up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtune.messages import Personal, PersonalTrace
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
