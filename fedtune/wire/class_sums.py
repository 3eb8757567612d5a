"""Sums of features by class to bytes and back, every number checked."""

from __future__ import annotations

import math

import numpy as np

from fedtune.class_sums import LARGEST_FEATURE, MOST_EXAMPLES, ClassSums
from fedtune.errors import WireError
from fedtune.messages import ClientUpdate, Measured, SumClasses, Training
from fedtune.wire.expect import MAX_COUNT, expect
from fedtune.wire.seed_updates import MIB
from fedtune.wire.v1 import round_pb2 as pb

MAX_BITS = 16
MAX_ENTRIES = 2**24
"""Classes times features."""


def to_message(task: SumClasses, training: Training) -> pb.Sum:
    return pb.Sum(batch=training.batch, fraction_bits=task.fraction_bits)


def from_message(message: pb.Sum) -> tuple[SumClasses, Training]:
    """Return what is to be summed up, and in which batches.

    Raises:
        WireError: if a number is out of its range.
    """
    expect(1 <= message.batch < 2**31, "sum: a batch of at least 1", message.batch)
    expect(message.fraction_bits <= MAX_BITS, f"sum: at most {MAX_BITS} fraction bits", message.fraction_bits)
    return SumClasses(message.fraction_bits), Training(batch=message.batch, steps=1)


def largest_bytes(classes: int, features: int) -> int:
    """Return the bytes beyond which no honest answer goes: ten for each number, and a header."""
    return 10 * (classes * features + classes + features) + 1024


def update_to_bytes(update: ClientUpdate, sums: ClassSums) -> bytes:
    """Return an update as it travels."""
    measured = update.measured
    return pb.SumUpdate(
        round=update.round,
        base=sums.base,
        counts=sums.counts.tolist(),
        sums=sums.sums.ravel().tolist(),
        squares=sums.squares.tolist(),
        seconds=measured.seconds,
        peak_mib=-(-measured.peak_bytes // MIB),
        tokens=measured.tokens,
        joules=measured.joules,
    ).SerializeToString()


def update_from_message(message: pb.SumUpdate, *, client: str) -> ClientUpdate:
    """Return the update of an authenticated client; whether its numbers may be used is for the admission to say.

    Raises:
        WireError: if there are not as many sums as classes and features make, or a number is out of all ranges.
    """
    classes, features = len(message.counts), len(message.squares)
    whole = len(message.sums) == classes * features
    expect(whole, f"a sum for each of {classes} classes and {features} features", len(message.sums))
    for name, value in (("a time", message.seconds), ("an energy", message.joules)):
        if not 0 <= value < math.inf:
            raise WireError(f"expected {name} of at least 0; got {value}")
    expect(message.tokens < MAX_COUNT, f"tokens below {MAX_COUNT}", message.tokens)
    # Before they become numbers of 64 bits with a sign.
    counted = max(message.counts, default=0)
    expect(counted <= MOST_EXAMPLES, f"at most {MOST_EXAMPLES} examples of a class", counted)
    most = MOST_EXAMPLES * LARGEST_FEATURE**2
    expect(max(message.squares, default=0) <= most, f"squares of at most {most}", max(message.squares, default=0))
    sums = np.array(message.sums, np.int64).reshape(classes, features)
    result = ClassSums(np.array(message.counts, np.int64), sums, np.array(message.squares, np.int64), message.base)
    measured = Measured(
        seconds=message.seconds,
        peak_bytes=message.peak_mib * MIB,
        tokens=message.tokens,
        joules=message.joules if message.HasField("joules") else None,
    )
    return ClientUpdate(client, message.round, result.examples, result, measured)
