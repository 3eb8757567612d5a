from __future__ import annotations

import math
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.errors import WireError
from fedtune.messages import (
    Assignment,
    ClientUpdate,
    LoraResult,
    Measured,
    Plan,
    ProbeResult,
    ProbeSeeds,
    SeedResult,
    SeedState,
    Training,
    TrainLora,
)
from fedtune.tensors import Array
from fedtune.wire import codec
from fedtune.wire.expect import LARGEST, MAX_COUNT
from fedtune.wire.v1 import round_pb2 as pb

LIMIT = 1 << 20
STATE = SeedState("whole", 0, bytes(8), 2, bytes(range(32)))
PROBE = ProbeSeeds(
    bank="hadamard",
    seeds=4,
    key=2**64 - 1,
    exponent=26,
    shift=5,
    perturbation=33_554,
    state=STATE,
    sampling="pro",
    levels=bytes([255, 1, 2, 3]),
    estimator="one-sided",
    queries=8,
    normalise=True,
    clip=0.5,
    trainable=("model.*", "head"),
    vectors=True,
    embeddings=True,
    calibrate=True,
    curvatures=True,
    groups=16,
    earlier=(2**64 - 1, 0),
)
TRAINING = Training(batch=3, learning_rate=3e-7, steps=200)
ASSIGNMENT = Assignment(
    method="fedkseed", round=3, seed=2**64 - 1, plan=Plan("bank-1", rank=1, scale=1.0, training=TRAINING), task=PROBE
)
PROBED = ProbeResult(
    np.array([0, 1, -1, 127, -127], np.int8),
    state=b"12345678",
    checks=bytes(range(16)),
    skipped=1,
    rms=0.25,
    lost=True,
    slopes=(0.5, -1.25),
    curvatures=(2000.0, -0.0),
)
UPDATE = ClientUpdate(
    client="bank-1",
    round=3,
    num_examples=120,
    result=PROBED,
    measured=Measured(seconds=1.5, peak_bytes=3 * 2**20, tokens=900, loss_before=2.5, loss_after=2.25),
)


def assignment_again(assignment: Assignment) -> Assignment:
    encoded = codec.encode_assignment(assignment)
    assert encoded.blobs == {}
    return codec.decode_assignment(encoded.header, {})


def update_again(update: ClientUpdate, client: str = "bank-1") -> ClientUpdate:
    return codec.decode_update(codec.encode_update(update), client=client, limit_bytes=LIMIT, task=ProbeSeeds)


def plain(update: ClientUpdate) -> object:
    """Return the update with its scalars as bytes, so that two can be compared, NaN as text."""
    assert update.probe is not None
    scalars = update.probe.scalars
    assert scalars.dtype == np.int8
    return repr(replace(update, result=replace(update.probe, scalars=scalars.tobytes())))  # type: ignore[arg-type]


def asked(**changes: Any) -> Assignment:
    return replace(ASSIGNMENT, task=replace(PROBE, **changes))


WORD = st.integers(0, 2**64 - 1)
COUNT = st.integers(0, 2**32 - 1)
SIZE = st.integers(0, MAX_COUNT - 1)
SINGLE = st.floats(0, width=32, allow_infinity=False)


@st.composite
def probes(draw: st.DrawFn) -> ProbeSeeds:
    seeds = draw(st.sampled_from([1, 4, 1024, 4096]))
    sampling = draw(st.sampled_from(["uniform", "distinct", "pro"]))
    one_sided = draw(st.booleans())
    round, calibrate = draw(COUNT), draw(st.booleans())
    return ProbeSeeds(
        bank=draw(st.sampled_from(["hadamard", "gaussian", "kron"])),
        seeds=seeds,
        key=draw(WORD),
        exponent=draw(st.integers(0, 125)),
        shift=draw(st.integers(0, 24)),
        perturbation=draw(st.integers(1, 2**31 - 1)),
        state=SeedState(
            form=draw(st.sampled_from(["whole", "changed", "log"])),
            since=draw(st.integers(0, round)),
            data=draw(st.binary(max_size=4 * seeds)),
            round=round,
            digest=draw(st.binary(min_size=32, max_size=32)),
        ),
        sampling=sampling,  # type: ignore[arg-type]
        levels=draw(st.binary(min_size=1, max_size=1)).replace(b"\0", b"\1") * seeds if sampling == "pro" else b"",
        estimator="one-sided" if one_sided else "two-sided",
        queries=draw(st.integers(1, 2**16 - 1)) if one_sided else 1,
        normalise=draw(st.booleans()),
        clip=draw(st.one_of(SINGLE, st.just(math.inf))),
        trainable=tuple(draw(st.lists(st.text(max_size=5), max_size=3))),
        vectors=draw(st.booleans()),
        embeddings=draw(st.booleans()),
        calibrate=calibrate,
        curvatures=calibrate and draw(st.booleans()),
    )


@settings(deadline=None)
@given(
    asked_for=probes(),
    round=COUNT,
    seed=WORD,
    client=st.text(),
    batch=st.integers(1, 2**31 - 1),
    learning_rate=st.floats(0, LARGEST, exclude_min=True),
    steps=st.integers(1, 2**16 - 1),
)
def test_a_probe_comes_back_exactly(
    asked_for: ProbeSeeds, round: int, seed: int, client: str, batch: int, learning_rate: float, steps: int
) -> None:
    training = Training(batch=batch, learning_rate=learning_rate, steps=steps)
    plan = Plan(client, rank=1, scale=1.0, training=training)
    assignment = Assignment("fedkseed", round, seed, plan, asked_for)
    found = assignment_again(assignment)
    assert found == assignment
    assert isinstance(found.task, ProbeSeeds)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"settings": b"{}"}, "the fields of the verb PROBE; got settings"),
        ({"down": [pb.Blob(role="global")]}, r"expected the role head, once, or none; got \['global'\]"),
        ({"local": pb.LocalAdapter(rank_penalty=1e30)}, "the fields of the verb PROBE; got local"),
        ({"surgery": pb.Surgery(wanted=True)}, "the fields of the verb PROBE; got surgery"),
        ({"plan": pb.Plan(client="bank-1", rank=4)}, "a plan that names a client, and nothing else"),
    ],
)
def test_fields_of_another_verb_are_refused(change: dict[str, Any], named: str) -> None:
    message = pb.Assignment.FromString(codec.encode_assignment(ASSIGNMENT).header)
    message.MergeFrom(pb.Assignment(**change))
    with pytest.raises(WireError, match=named):
        codec.decode_outline(message.SerializeToString())


def test_every_field_travels() -> None:
    assert assignment_again(ASSIGNMENT) == ASSIGNMENT
    other = ProbeSeeds(
        bank="kron",
        seeds=16,
        key=7,
        exponent=0,
        shift=0,
        perturbation=1,
        state=SeedState("log", 1, b"log", 2, bytes(32)),
    )
    assert assignment_again(replace(ASSIGNMENT, task=other)).probe == other


def test_a_clip_of_zero_and_none_at_all_are_told_apart() -> None:
    for clip in (0.0, math.inf, 0.5):
        found = assignment_again(asked(clip=clip)).probe
        assert found is not None
        assert found.clip == clip


def test_an_assignment_is_as_long_as_its_accumulators() -> None:
    data = np.arange(4096, dtype=np.int32).tobytes()
    state = replace(STATE, data=data)
    whole = asked(seeds=4096, state=state, sampling="uniform", levels=b"", trainable=())
    assert 16_384 < len(codec.encode_assignment(whole).header) < 16_384 + 200
    drawn = asked(seeds=4096, state=state, levels=bytes([255]) * 4096, trainable=())
    assert 16_384 + 4096 < len(codec.encode_assignment(drawn).header) < 16_384 + 4096 + 200
    # Of ten clients, 200 scalars each: one missed round.
    log = asked(seeds=4096, state=replace(STATE, form="log", data=bytes(2113)), sampling="uniform", levels=b"")
    assert len(codec.encode_assignment(log).header) < 2113 + 200


def test_more_scalars_than_a_log_can_hold_are_not_asked_for() -> None:
    plan = replace(ASSIGNMENT.plan, training=replace(TRAINING, steps=2**16))
    with pytest.raises(WireError, match=r"client\.steps: expected at most 65535 scalars a round; got 65536"):
        codec.encode_assignment(replace(ASSIGNMENT, plan=plan))


def changed(change: Callable[[Any], object]) -> bytes:
    """Return the encoded assignment with its probe changed."""
    header = pb.Assignment.FromString(codec.encode_assignment(ASSIGNMENT).header)
    change(header.probe)
    return header.SerializeToString()


LIES: dict[str, tuple[Callable[[Any], object], str]] = {
    "no bank": (lambda p: p.ClearField("bank"), "bank"),
    "unknown bank": (lambda p: setattr(p, "bank", 4), "expected bank in"),
    "no seeds": (lambda p: p.ClearField("seeds"), "seeds from 1 to 4096; got 0"),
    "many seeds": (lambda p: setattr(p, "seeds", 4097), "seeds from 1 to 4096; got 4097"),
    "exponent": (lambda p: setattr(p, "exponent", 126), "exponent from 0 to 125; got 126"),
    "shift": (lambda p: setattr(p, "shift", 25), "shift from 0 to 24; got 25"),
    "no perturbation": (lambda p: p.ClearField("perturbation"), "perturbation from 1"),
    "perturbation": (lambda p: setattr(p, "perturbation", 2**31), "perturbation from 1 to 2147483647"),
    "no steps": (lambda p: p.ClearField("steps"), "steps from 1 to 65535; got 0"),
    "many steps": (lambda p: setattr(p, "steps", 2**16), "steps from 1 to 65535; got 65536"),
    "no batch": (lambda p: p.ClearField("batch"), "batch from 1"),
    "batch": (lambda p: setattr(p, "batch", 2**31), "batch from 1"),
    "queries": (lambda p: setattr(p, "queries", 2**16), "queries from 0 to 65535; got 65536"),
    "since the future": (lambda p: setattr(p.state, "since", 3), r"state\.since from 0 to 2; got 3"),
    "no learning rate": (lambda p: p.ClearField("learning_rate"), "learning rate above 0"),
    "negative learning rate": (lambda p: setattr(p, "learning_rate", -1e-7), "learning rate above 0"),
    "infinite learning rate": (lambda p: setattr(p, "learning_rate", math.inf), "learning rate above 0"),
    "NaN learning rate": (lambda p: setattr(p, "learning_rate", math.nan), "learning rate above 0"),
    "negative clip": (lambda p: setattr(p, "clip", -1.0), "clip of at least 0"),
    "NaN clip": (lambda p: setattr(p, "clip", math.nan), "clip of at least 0"),
    "unknown sampling": (lambda p: setattr(p, "sampling", 3), "expected sampling in"),
    "no levels": (lambda p: p.ClearField("levels"), "level above 0 for each seed that is drawn by it; got 0"),
    "few levels": (lambda p: setattr(p, "levels", b"\1\2\3"), "level above 0 for each seed"),
    "many levels": (lambda p: setattr(p, "levels", b"\1\2\3\4\5"), "level above 0 for each seed"),
    "a level of zero": (lambda p: setattr(p, "levels", b"\1\2\0\4"), "level above 0 for each seed"),
    "levels not asked for": (lambda p: setattr(p, "sampling", pb.UNIFORM), "level above 0 for each seed"),
    "curvatures of steps": (lambda p: p.ClearField("calibrate"), "curvatures of a calibration alone"),
    "no form": (lambda p: p.state.ClearField("form"), "expected form in"),
    "unknown form": (lambda p: setattr(p.state, "form", 9), "expected form in"),
    "no state": (lambda p: p.ClearField("state"), "digest of 32 bytes .* got 0 and"),
    "short digest": (lambda p: setattr(p.state, "digest", bytes(31)), "digest of 32 bytes .* got 31 and"),
    "long digest": (lambda p: setattr(p.state, "digest", bytes(33)), "digest of 32 bytes .* got 33 and"),
    "unknown field": (lambda p: p.MergeFromString(b"\xf8\x07\x01"), "fields of Assignment of this release"),
    "unknown field within": (lambda p: p.state.MergeFromString(b"\xf8\x07\x01"), "fields of Assignment of this"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_probe_out_of_its_range_is_refused(lie: str) -> None:
    change, reason = LIES[lie]
    with pytest.raises(WireError, match=reason):
        codec.decode_assignment(changed(change), {})


def test_every_truncated_probe_is_refused_or_lacks_a_field() -> None:
    header = codec.encode_assignment(ASSIGNMENT).header
    refused = 0
    for length in range(len(header)):
        try:
            found = codec.decode_assignment(header[:length], {})
        except WireError:
            refused += 1
            continue
        assert found != ASSIGNMENT
    # A message of the schema may end between two of its fields; all of the probe's own lie within one.
    assert refused == len(header)


def test_flipped_bits_give_a_wire_error_or_another_message_and_nothing_else() -> None:
    rng = random.Random(0)
    header, data = codec.encode_assignment(ASSIGNMENT).header, codec.encode_update(UPDATE)
    for _ in range(1500):
        place, bit = rng.randrange(len(header)), 1 << rng.randrange(8)
        flipped = header[:place] + bytes([header[place] ^ bit]) + header[place + 1 :]
        with suppress(WireError):
            assert codec.decode_assignment(flipped, {}).round >= 0
        place = rng.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :]
        try:
            found = codec.decode_update(flipped, client="bank-1", limit_bytes=LIMIT, task=ProbeSeeds)
        except WireError as error:
            assert str(error).startswith("bank-1: ")  # noqa: PT017  # most flips make another message
            continue
        assert (found.client, isinstance(found.result, SeedResult)) == ("bank-1", True)


@settings(deadline=None)
@given(
    scalars=st.lists(st.integers(-128, 127), max_size=300).map(lambda q: np.array(q, np.int8)),
    state=st.binary(max_size=12),
    checks=st.binary(max_size=20),
    counts=st.tuples(COUNT, COUNT, COUNT, SIZE, SIZE),
    floats=st.lists(st.none() | st.floats(width=32), min_size=3, max_size=3),
    seconds=SINGLE,
    lost=st.booleans(),
    measured=st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), max_size=20),
)
def test_an_update_comes_back_exactly(
    scalars: Array,
    state: bytes,
    checks: bytes,
    counts: tuple[int, int, int, int, int],
    floats: list[float | None],
    seconds: float,
    lost: bool,
    measured: list[tuple[float, float]],
) -> None:
    slopes, curvatures = (tuple(part) for part in zip(*measured, strict=True)) if measured else ((), ())
    round, skipped, peak_mib, examples, tokens = counts
    update = ClientUpdate(
        client="bank-1",
        round=round,
        num_examples=examples,
        result=ProbeResult(scalars, state, checks, skipped, floats[2], lost, slopes=slopes, curvatures=curvatures),
        measured=Measured(seconds, peak_mib * 2**20, tokens, loss_before=floats[0], loss_after=floats[1]),
    )
    assert plain(update_again(update)) == plain(update)


def test_joules_arrive_where_they_were_sent_and_no_others() -> None:
    assert update_again(replace(UPDATE, measured=replace(UPDATE.measured, joules=12.5))).measured.joules == 12.5
    assert update_again(UPDATE).measured.joules is None
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(WireError, match="an energy of at least 0 J"):
            update_again(replace(UPDATE, measured=replace(UPDATE.measured, joules=wrong)))


def test_the_author_is_the_client_that_the_transport_knows() -> None:
    assert update_again(UPDATE, client="bank-2").client == "bank-2"


def test_peak_memory_is_rounded_up_to_the_next_mebibyte() -> None:
    for peak, expected in ((0, 0), (1, 2**20), (2**20, 2**20), (2**20 + 1, 2**21)):
        found = update_again(replace(UPDATE, measured=replace(UPDATE.measured, peak_bytes=peak)))
        assert found.measured.peak_bytes == expected


def test_200_scalars_take_at_most_260_bytes() -> None:
    honest = ProbeResult(np.full(200, -127, np.int8), state=bytes(8), checks=bytes(16), skipped=20)
    measured = Measured(3599.9, 2**33, 200_000, loss_before=10.5, loss_after=9.5)
    data = codec.encode_update(replace(UPDATE, round=60, num_examples=5000, measured=measured, result=honest))
    assert 200 < len(data) <= 260
    metered = replace(UPDATE, round=60, num_examples=5000, measured=replace(measured, joules=500.0), result=honest)
    assert len(codec.encode_update(metered)) == len(data) + 5
    # Numbers are written in as many bytes as they need: the largest of all add two dozen.
    counts = {"round": 2**32 - 1, "num_examples": 2**64 - 1}
    most = replace(measured, peak_bytes=(2**32 - 1) * 2**20, tokens=2**64 - 1)
    assert len(codec.encode_update(replace(UPDATE, measured=most, **counts, result=honest))) <= 290  # type: ignore[arg-type]


def test_an_answer_that_asks_again_takes_a_few_bytes() -> None:
    asks = ClientUpdate("bank-1", 3, 120, ProbeResult(np.empty(0, np.int8), lost=True))
    assert len(codec.encode_update(asks)) < 16
    found = update_again(asks).probe
    assert found is not None
    assert (found.lost, len(found.scalars), found.rms) == (True, 0, None)


def test_every_truncated_update_is_refused_or_lacks_a_field() -> None:
    data = codec.encode_update(UPDATE)
    refused = 0
    for length in range(len(data)):
        try:
            found = codec.decode_update(data[:length], client="bank-1", limit_bytes=LIMIT, task=ProbeSeeds)
        except WireError as error:
            assert str(error).startswith("bank-1: ")  # noqa: PT017  # a cut between two fields is another message
            refused += 1
            continue
        assert plain(found) != plain(UPDATE)
    # Twelve of its thirteen fields can end a message that is cut, and so can none.
    assert len(data) - refused == 15


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_a_time_that_is_none_is_refused(seconds: float) -> None:
    with pytest.raises(WireError, match=r"^bank-1: expected a time of at least 0 s"):
        update_again(replace(UPDATE, measured=replace(UPDATE.measured, seconds=seconds)))


def test_an_update_with_fields_of_another_release_is_refused() -> None:
    data = codec.encode_update(UPDATE) + b"\xf8\x07\x01"
    with pytest.raises(WireError, match=r"^bank-1: expected the fields of ProbeUpdate of this release"):
        codec.decode_update(data, client="bank-1", limit_bytes=LIMIT, task=ProbeSeeds)


def test_an_update_above_the_limit_is_not_read() -> None:
    data = codec.encode_update(UPDATE)
    with pytest.raises(WireError, match=f"at most {len(data) - 1} bytes; got {len(data)}"):
        codec.decode_update(data, client="bank-1", limit_bytes=len(data) - 1, task=ProbeSeeds)


def test_an_answer_to_the_other_verb_is_refused_either_way() -> None:
    adapted = replace(UPDATE, result=LoraResult({"layer.a": np.ones((2, 3), np.float32)}))
    with pytest.raises(WireError, match=r"^bank-1: "):
        codec.decode_update(codec.encode_update(adapted), client="bank-1", limit_bytes=LIMIT, task=ProbeSeeds)
    with pytest.raises(WireError, match=r"^bank-1: "):
        codec.decode_update(codec.encode_update(UPDATE), client="bank-1", limit_bytes=LIMIT, task=TrainLora)


@settings(deadline=None)
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_a_wire_error(data: bytes) -> None:
    try:
        found = codec.decode_update(data, client="bank-1", limit_bytes=LIMIT, task=ProbeSeeds)
    except WireError:
        return
    numbers = found.probe.scalars if isinstance(found.result, ProbeResult) else found.descend.numbers
    assert numbers.dtype == np.int8
