from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import Message

from fedtune.errors import WireError
from fedtune.messages import (
    Assignment,
    ClientScores,
    ClientUpdate,
    Measured,
    Plan,
    Preference,
    ProbeResult,
    ProbeSeeds,
    Proximal,
    ScoreRequest,
    SeedState,
    TailRank,
    Training,
    TrainLora,
)
from fedtune.wire.codec import decode_assignment, decode_update, encode_assignment, encode_update
from fedtune.wire.expect import LARGEST, MAX_COUNT, expect
from fedtune.wire.scores import decode_score_request, decode_scores, encode_score_request, encode_scores
from fedtune.wire.v1 import round_pb2 as pb

TRAINING = Training(batch=2, learning_rate=0.1, steps=3)
TERMS = (TailRank(0.1, 0.9), Proximal(0.1), Preference(0.5))
PLAN = Plan("ann", 4, 2.0, TRAINING, 0.25, back=0.5)
ADAPTERS = Assignment("m", 1, 2, PLAN, TrainLora(a_key=3, terms=TERMS), base="b")
STATE = SeedState("whole", 0, bytes(64), 0, bytes(32))
PROBE = ProbeSeeds("hadamard", 16, 1, 20, 4, 16, STATE, estimator="one-sided", queries=2, clip=1.0)
SEEDS = Assignment("m", 1, 2, Plan("ann", 1, 1.0, TRAINING), PROBE)
SCORES = ScoreRequest("ann", "m", 1, "b", batch=2, examples=3, preference=Preference(0.5))
SCALARS = ClientUpdate("ann", 1, 5, ProbeResult(np.ones(3, np.int8)), Measured(1.0, 2**20, 7, 1.0, 1.0))
SAID = ClientScores("ann", 1, "b", {}, seconds=1.0)


def test_what_holds_passes_and_what_does_not_is_named_with_what_came() -> None:
    expect(True, "anything", "something")
    with pytest.raises(WireError, match=r"^expected at most 2 bytes; got 3$"):
        expect(False, "at most 2 bytes", 3)
    with pytest.raises(WireError, match=r"^expected this release; got another; update it$"):
        expect(False, "this release", "another", hint="update it")


Decode = Callable[[bytes], Any]
MESSAGES: Mapping[str, tuple[bytes, type[Message], Decode]] = {
    "adapters": (encode_assignment(ADAPTERS).header, pb.Assignment, lambda data: decode_assignment(data, {})),
    "seeds": (encode_assignment(SEEDS).header, pb.Assignment, lambda data: decode_assignment(data, {})),
    "scores": (encode_score_request(SCORES).header, pb.Assignment, lambda data: decode_score_request(data, {})),
    "scalars": (
        encode_update(SCALARS),
        pb.ProbeUpdate,
        lambda data: decode_update(data, client="ann", limit_bytes=2**20, task=ProbeSeeds),
    ),
    "said": (encode_scores(SAID), pb.ScoreUpdate, lambda data: decode_scores(data, client="ann")),
}
KEYS = ("seed", "key", "a_key")
"""Of 64 bits, from which numbers are drawn."""
ELSEWHERE = ("loss_before", "loss_after", "rms", "clip")
"""Admission refuses the first three where they are not finite; without a bound the last is infinite."""
EXTREMES = (math.inf, -math.inf, math.nan, 1e300, -1.0, 3.5e38, 1e-300)


def numbers(value: Any) -> Iterator[float]:
    """Yield every number in a decoded message, apart from keys of 64 bits."""
    for one in fields(value):
        inner = getattr(value, one.name)
        if is_dataclass(inner):
            yield from numbers(inner)
        elif isinstance(inner, int | float) and one.name not in (*KEYS, *ELSEWHERE):
            yield inner


def written(message: Message) -> Iterator[tuple[Message, Any]]:
    """Yield (message, field) of every number of a message and of those within it."""
    for one in message.DESCRIPTOR.fields:
        value = getattr(message, one.name)
        if isinstance(value, Message):
            if message.HasField(one.name):
                yield from written(value)
        elif isinstance(value, int | float) and not isinstance(value, bool) and one.enum_type is None:
            yield message, one


@pytest.mark.guarantee("G2")
@pytest.mark.parametrize("name", MESSAGES)
def test_every_number_that_is_decoded_is_one_of_float32_or_a_count(name: str) -> None:
    data, kind, decode = MESSAGES[name]
    assert decode(data)
    tried = 0
    for place in range(len(list(written(kind.FromString(data))))):
        for extreme in (*EXTREMES, 2**32 - 1, 2**64 - 1, 2**53):
            message = kind.FromString(data)
            holder, one = list(written(message))[place]
            try:
                setattr(holder, one.name, extreme)
            except (ValueError, TypeError):
                continue  # no such field can hold it
            tried += 1
            try:
                found = decode(message.SerializeToString())
            except WireError:
                continue
            assert all(abs(number) <= LARGEST for number in numbers(found)), one.name
            assert all(number < MAX_COUNT for number in numbers(found) if isinstance(number, int)), one.name
    assert tried > 10
