from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedtune.class_sums import MOST_EXAMPLES, ClassSums
from fedtune.errors import WireError
from fedtune.messages import Assignment, ClientUpdate, Measured, Plan, SumClasses, Training, TrainLora
from fedtune.wire.class_sums import largest_bytes
from fedtune.wire.codec import decode_assignment, decode_update, encode_assignment, encode_update
from fedtune.wire.v1 import round_pb2 as pb

ORDER = Assignment("fedit", 1, 7, Plan("ann", 1, 1.0, Training(batch=8, steps=1)), SumClasses(11), base="ab" * 32)
SUMS = ClassSums(
    np.array([2, 0, 5]),
    np.array([[-(2**40), 3], [0, 0], [7, -1]]),
    np.array([2**50, 12]),
    base="ab" * 32,
)
UPDATE = ClientUpdate("ann", 1, 7, SUMS, Measured(seconds=1.5, peak_bytes=3 * 2**20, tokens=40, joules=2.0))
LIMIT = largest_bytes(3, 2)


def decoded(data: bytes, limit: int = LIMIT) -> ClientUpdate:
    return decode_update(data, client="ann", limit_bytes=limit, task=SumClasses)


def test_an_order_comes_back_as_it_was_sent() -> None:
    assert decode_assignment(encode_assignment(ORDER).header, {}) == ORDER


def test_sums_come_back_as_they_were_sent() -> None:
    came = decoded(encode_update(UPDATE))
    assert replace(came, result=SUMS) == UPDATE
    for name in ("counts", "sums", "squares"):
        sent, got = getattr(SUMS, name), getattr(came.class_sums, name)
        assert got.dtype == np.int64
        assert np.array_equal(sent, got)
    assert len(encode_update(UPDATE)) < LIMIT


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"batch": 0}, "a batch of at least 1"),
        ({"fraction_bits": 17}, "at most 16 fraction bits"),
    ],
)
def test_an_order_out_of_range_is_refused(changes: dict[str, int], what: str) -> None:
    message = pb.Assignment.FromString(encode_assignment(ORDER).header)
    for name, value in changes.items():
        setattr(message.sum, name, value)
    with pytest.raises(WireError, match=what):
        decode_assignment(message.SerializeToString(), {})


def test_an_order_for_sums_has_no_tensors_and_no_other_numbers() -> None:
    message = pb.Assignment.FromString(encode_assignment(ORDER).header)
    message.settings = b"{}"
    with pytest.raises(WireError, match="the fields of the verb SUM; got settings"):
        decode_assignment(message.SerializeToString(), {})
    message.ClearField("settings")
    message.plan.rank = 2
    with pytest.raises(WireError, match="a plan that names a client"):
        decode_assignment(message.SerializeToString(), {})


@pytest.mark.guarantee("G2")
@pytest.mark.parametrize(
    ("message", "what"),
    [
        (pb.SumUpdate(counts=[1, 2], squares=[1], sums=[1]), "a sum for each of 2 classes and 1 features; got 1"),
        (pb.SumUpdate(counts=[MOST_EXAMPLES + 1], squares=[1], sums=[1]), "examples of a class"),
        (pb.SumUpdate(counts=[1], squares=[2**64 - 1], sums=[1]), "squares of at most"),
        # One more than 64 bits with a sign hold.
        (pb.SumUpdate(counts=[1], squares=[2**63], sums=[1]), "squares of at most"),
        (pb.SumUpdate(seconds=float("nan")), "a time of at least 0"),
        (pb.SumUpdate(joules=float("inf")), "an energy of at least 0"),
        (pb.SumUpdate(tokens=2**60), "tokens below"),
    ],
)
def test_an_answer_out_of_all_ranges_is_refused(message: pb.SumUpdate, what: str) -> None:
    with pytest.raises(WireError, match=f"ann: expected .*{what}"):
        decoded(message.SerializeToString())


@pytest.mark.guarantee("G2")
def test_every_torn_byte_and_a_longer_answer_is_refused_or_another_value() -> None:
    data = encode_update(UPDATE)
    for end in range(len(data)):
        try:
            came = decoded(data[:end])
        except WireError:
            continue
        assert came.num_examples != 7 or came.class_sums.base != SUMS.base or came.measured != UPDATE.measured
    with pytest.raises(WireError, match=f"at most {LIMIT} bytes"):
        decoded(bytes(LIMIT + 1))
    with pytest.raises(WireError):  # another task's answer
        decode_update(data, client="ann", limit_bytes=LIMIT, task=TrainLora)
