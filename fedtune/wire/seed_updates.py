"""What is answered along seeded directions, as a message of the schema and back, every number checked."""

from __future__ import annotations

import math

import numpy as np

from fedtune.errors import WireError
from fedtune.messages import ClientUpdate, DescendResult, Measured, ProbeResult, SeedResult
from fedtune.wire import descend
from fedtune.wire.expect import MAX_COUNT, expect
from fedtune.wire.v1 import round_pb2 as pb

MIB = 2**20


def to_message(update: ClientUpdate, result: SeedResult) -> pb.ProbeUpdate:
    """Return the message of an update."""
    measured = update.measured
    message = pb.ProbeUpdate(
        state=result.state,
        checks=result.checks,
        round=update.round,
        examples=update.num_examples,
        skipped=result.skipped,
        seconds=measured.seconds,
        # Rounded up: a planner that reads too small a number would ask for more than the device has.
        peak_mib=-(-measured.peak_bytes // MIB),
        tokens=measured.tokens,
        loss_before=measured.loss_before,
        loss_after=measured.loss_after,
        joules=measured.joules,
    )
    match result:
        case ProbeResult():
            own = pb.ProbeUpdate(
                scalars=result.scalars.astype(np.int8).tobytes(),
                rms=result.rms,
                lost=result.lost,
                slopes=result.slopes,
                curvatures=result.curvatures,
            )
        case DescendResult():
            own = descend.numbers_to(result)
    message.MergeFrom(own)
    return message


def from_message(message: pb.ProbeUpdate, *, client: str) -> ClientUpdate:
    """Return the update of an authenticated client; whether its numbers may be used is for the admission to say.

    Raises:
        WireError: if the time or the energy is none, or the numbers cannot be read.
    """
    if not 0 <= message.seconds < math.inf:
        raise WireError(f"expected a time of at least 0 s; got {message.seconds}")
    if not 0 <= message.joules < math.inf:
        raise WireError(f"expected an energy of at least 0 J; got {message.joules}")
    if (size := max(message.examples, message.tokens)) >= MAX_COUNT:
        raise WireError(f"expected examples and tokens below {MAX_COUNT}; got {size}")
    return ClientUpdate(
        client=client,
        round=message.round,
        num_examples=message.examples,
        measured=Measured(
            seconds=message.seconds,
            peak_bytes=message.peak_mib * MIB,
            tokens=message.tokens,
            loss_before=message.loss_before if message.HasField("loss_before") else None,
            loss_after=message.loss_after if message.HasField("loss_after") else None,
            joules=message.joules if message.HasField("joules") else None,
        ),
        result=descend.numbers_from(message) if message.bits else scalars_from(message),
    )


def scalars_from(message: pb.ProbeUpdate) -> ProbeResult:
    """Return the result of a client that measured seeds.

    Raises:
        WireError: if it has numbers of which it does not say how wide they are.
    """
    strange = bool(message.numbers) or message.shift or message.count
    expect(not strange, "bits of the numbers, or no numbers", "numbers of 0 bits")
    return ProbeResult(
        scalars=np.frombuffer(message.scalars, np.int8),
        state=message.state,
        checks=message.checks,
        skipped=message.skipped,
        rms=message.rms if message.HasField("rms") else None,
        lost=message.lost,
        slopes=tuple(message.slopes),
        curvatures=tuple(message.curvatures),
    )
