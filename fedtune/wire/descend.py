"""What clients that descend along seeds are asked, and their numbers, as messages of the schema and back."""

from __future__ import annotations

from typing import Any, get_args

from fedtune.directions.downlink import MAX_SHIFT
from fedtune.directions.numbers import MAX_NUMBERS, pack, unpack
from fedtune.messages import DescendResult, DescendSeeds, ScalarBits, Training
from fedtune.wire import probe
from fedtune.wire.expect import LARGEST, MAX_NUMBER, expect
from fedtune.wire.v1 import round_pb2 as pb

MEASURING = ("steps", "batch", "learning_rate")
"""Fields of a `Probe` that say how much to measure: none is there where a client must descend."""


def to_message(task: DescendSeeds, training: Training) -> pb.Descend:
    """Return the message of an assignment.

    Raises:
        WireError: if there are more scalars than can travel.
    """
    asked = probe.to_message(task.probe, task.fallback or Training(steps=1))
    for name in MEASURING if task.fallback is None else ():
        asked.ClearField(name)
    return pb.Descend(
        probe=asked,
        steps=training.steps,
        batch=training.batch,
        learning_rate=training.rate,
        # 0 is one forward pass a step, so that most messages need no field for it.
        accumulation=0 if training.accumulation == 1 else training.accumulation,
        count=task.count,
        bits=task.bits,
        largest_shift=task.largest_shift,
    )


def from_message(message: pb.Descend) -> tuple[DescendSeeds, Training]:
    """Return the task, and how to train for it.

    Raises:
        WireError: if a number is out of its range.
    """
    ranges = {
        "steps": (message.steps, 1, MAX_NUMBER - 1),
        "batch": (message.batch, 1, MAX_NUMBER - 1),
        "accumulation": (message.accumulation, 0, MAX_NUMBER - 1),
        "count": (message.count, 1, MAX_NUMBERS),
        "largest_shift": (message.largest_shift, 0, MAX_SHIFT),
    }
    for name, (value, least, most) in ranges.items():
        expect(least <= value <= most, f"descend: {name} from {least} to {most}", value)
    expect(0 < message.learning_rate <= LARGEST, "descend: a learning rate above 0", message.learning_rate)
    bits = bits_of(message.bits)
    asked = pb.Probe()
    asked.CopyFrom(message.probe)
    must = not any(getattr(asked, name) for name in MEASURING)
    if must:
        # Numbers that the checks of a probe let pass; nothing reads them.
        asked.MergeFrom(pb.Probe(steps=1, batch=1, learning_rate=1.0))
    measured, fallback = probe.from_message(asked)
    training = Training(
        batch=message.batch,
        learning_rate=message.learning_rate,
        steps=message.steps,
        accumulation=message.accumulation or 1,
    )
    return DescendSeeds(measured, message.count, message.largest_shift, bits, None if must else fallback), training


def numbers_to(result: DescendResult) -> pb.ProbeUpdate:
    """Return the part of an update's message that a client that measures seeds does not have."""
    numbers = pack(result.numbers, result.bits)
    return pb.ProbeUpdate(numbers=numbers, shift=result.shift, bits=result.bits, count=len(result.numbers))


def numbers_from(message: pb.ProbeUpdate) -> DescendResult:
    """Return the result of a client that descended.

    Raises:
        WireError: if it says that seeds were measured too, or its bytes are no numbers.
    """
    both = message.scalars or message.lost or message.HasField("rms") or message.slopes or message.curvatures
    expect(not both, "numbers or scalars", "both")
    expect(message.shift <= MAX_SHIFT, f"a shift of at most {MAX_SHIFT}", message.shift)
    bits = bits_of(message.bits)
    numbers = unpack(message.numbers, message.count, bits)
    return DescendResult(numbers, message.shift, bits, message.state, message.checks, message.skipped)


def bits_of(number: int) -> ScalarBits:
    """Return a number as one of the widths that numbers travel in.

    Raises:
        WireError: if it is none.
    """
    known: Any = number
    expect(known in get_args(ScalarBits), "8, 4 or 2 bits", number)
    return known  # type: ignore[no-any-return]
