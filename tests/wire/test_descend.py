from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions.numbers import MAX_NUMBERS
from fedtune.errors import WireError
from fedtune.messages import (
    Assignment,
    ClientUpdate,
    DescendResult,
    DescendSeeds,
    Measured,
    Plan,
    ProbeResult,
    ScalarBits,
    Training,
)
from fedtune.wire import codec
from fedtune.wire.v1 import round_pb2 as pb
from tests.wire.test_probe import ASSIGNMENT as PROBED
from tests.wire.test_probe import LIMIT, PROBE, probes

TRAINING = Training(batch=3, learning_rate=0.02, steps=8, accumulation=2)
FALLBACK = Training(batch=2, learning_rate=3e-7, steps=200)
TASK = DescendSeeds(PROBE, count=16, largest_shift=9, bits=4, fallback=FALLBACK)
ASSIGNMENT = Assignment(
    "fedkseed", round=3, seed=2**64 - 1, plan=Plan("bank-1", rank=1, scale=1.0, training=TRAINING), task=TASK
)
RESULT = DescendResult(np.array([7, -7, 0, 1], np.int8), 5, 4, b"12345678", bytes(range(16)), skipped=1)
UPDATE = ClientUpdate("bank-1", 3, 120, RESULT, Measured(1.5, 3 * 2**20, 900, loss_before=2.5, loss_after=2.25))


def assignment_again(assignment: Assignment) -> Assignment:
    encoded = codec.encode_assignment(assignment)
    assert encoded.blobs == {}
    return codec.decode_assignment(encoded.header, {})


def update_again(update: ClientUpdate) -> ClientUpdate:
    data = codec.encode_update(update)
    return codec.decode_update(data, client="bank-1", limit_bytes=LIMIT, task=DescendSeeds)


def plain(update: ClientUpdate) -> object:
    """Return an update that can be compared."""
    return replace(update, result=replace(update.descend, numbers=update.descend.numbers.tobytes()))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(
    asked=probes(),
    count=st.integers(1, MAX_NUMBERS),
    largest_shift=st.integers(0, 24),
    bits=st.sampled_from(get_args(ScalarBits)),
    fallback=st.sampled_from([None, FALLBACK]),
)
def test_an_order_comes_back_exactly(
    asked: Any, count: int, largest_shift: int, bits: ScalarBits, fallback: Training | None
) -> None:
    order = replace(ASSIGNMENT, task=DescendSeeds(asked, count, largest_shift, bits, fallback))
    assert assignment_again(order) == order


def test_an_order_without_fallback_names_no_steps_of_measuring() -> None:
    header = pb.Assignment.FromString(
        codec.encode_assignment(replace(ASSIGNMENT, task=replace(TASK, fallback=None))).header
    )
    asked = header.descend.probe
    assert (header.verb, asked.steps, asked.batch, asked.learning_rate) == (pb.DESCEND, 0, 0, 0.0)


LIES: dict[str, tuple[Callable[[Any], object], str]] = {
    "no steps": (lambda d: d.ClearField("steps"), "steps from 1"),
    "no batch": (lambda d: d.ClearField("batch"), "batch from 1"),
    "no rate": (lambda d: d.ClearField("learning_rate"), "a learning rate above 0"),
    "NaN rate": (lambda d: setattr(d, "learning_rate", math.nan), "a learning rate above 0"),
    "no numbers": (lambda d: d.ClearField("count"), "count from 1 to 1048576; got 0"),
    "many numbers": (lambda d: setattr(d, "count", MAX_NUMBERS + 1), "count from 1 to 1048576"),
    "no bits": (lambda d: d.ClearField("bits"), "8, 4 or 2 bits; got 0"),
    "three bits": (lambda d: setattr(d, "bits", 3), "8, 4 or 2 bits; got 3"),
    "shift": (lambda d: setattr(d, "largest_shift", 25), "largest_shift from 0 to 24; got 25"),
    "half a fallback": (lambda d: d.probe.ClearField("steps"), "expected steps from 1"),
    "no probe": (lambda d: d.ClearField("probe"), "probe: expected"),
    "a wrong probe": (lambda d: setattr(d.probe, "exponent", 126), "exponent from 0 to 125; got 126"),
    "unknown field": (lambda d: d.MergeFromString(b"\xf8\x07\x01"), "fields of Assignment of this release"),
}


@pytest.mark.parametrize("lie", LIES)
def test_an_order_out_of_its_range_is_refused(lie: str) -> None:
    change, reason = LIES[lie]
    header = pb.Assignment.FromString(codec.encode_assignment(ASSIGNMENT).header)
    change(header.descend)
    with pytest.raises(WireError, match=reason):
        codec.decode_assignment(header.SerializeToString(), {})


def test_fields_of_another_verb_are_refused() -> None:
    header = pb.Assignment.FromString(codec.encode_assignment(ASSIGNMENT).header)
    header.probe.CopyFrom(pb.Assignment.FromString(codec.encode_assignment(PROBED).header).probe)
    with pytest.raises(WireError, match="the fields of the verb DESCEND; got probe"):
        codec.decode_assignment(header.SerializeToString(), {})


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-8, 7), max_size=40), st.integers(0, 24))
def test_an_update_comes_back_exactly(numbers: list[int], shift: int) -> None:
    update = replace(UPDATE, result=replace(RESULT, numbers=np.array(numbers, np.int8), shift=shift))
    assert plain(update_again(update)) == plain(update)


def test_a_client_that_measured_instead_says_so_by_its_scalars() -> None:
    measured = replace(UPDATE, result=ProbeResult(np.array([1, -1], np.int8), b"12345678", bytes(16)))
    assert update_again(measured).probe.scalars.tolist() == [1, -1]
    lost = replace(UPDATE, result=ProbeResult(np.empty(0, np.int8), lost=True))
    assert update_again(lost).probe.lost


def test_four_thousand_numbers_take_a_few_dozen_bytes_more_than_their_bits() -> None:
    for bits, bound in ((8, 127), (4, 7), (2, 1)):
        full = DescendResult(np.full(4096, bound, np.int8), 24, bits, bytes(8), bytes(16), 8)  # type: ignore[arg-type]
        assert len(codec.encode_update(replace(UPDATE, result=full))) <= 4096 * bits // 8 + 90


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "scalars too": ({"scalars": b"\1"}, "numbers or scalars; got both"),
    "a size too": ({"rms": 0.0}, "numbers or scalars; got both"),
    "lost too": ({"lost": True}, "numbers or scalars; got both"),
    "bits": ({"bits": 5}, "8, 4 or 2 bits; got 5"),
    "many bits": ({"bits": 2**31}, "8, 4 or 2 bits"),
    "shift": ({"shift": 25}, "a shift of at most 24; got 25"),
    "shift that overflows": ({"shift": 2**32 - 1}, "a shift of at most 24"),
    "more numbers than bytes": ({"count": 2**32 - 1}, "bytes for 4294967295 of 4 bits"),
    "fewer numbers than bytes": ({"count": 2}, "1 bytes for 2 of 4 bits"),
    "no numbers": ({"numbers": b""}, "2 bytes for 4 of 4 bits"),
    "no bits": ({"bits": 0}, "bits of the numbers, or no numbers"),
}


@pytest.mark.parametrize("lie", BAD)
def test_an_update_that_cannot_be_is_refused(lie: str) -> None:
    change, reason = BAD[lie]
    message = pb.ProbeUpdate.FromString(codec.encode_update(UPDATE))
    for name, value in change.items():
        setattr(message, name, value)
    with pytest.raises(WireError, match=f"bank-1: .*{reason}"):
        codec.decode_update(message.SerializeToString(), client="bank-1", limit_bytes=LIMIT, task=DescendSeeds)
