from __future__ import annotations

import random
import re
import tracemalloc
import zlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.errors import WireError
from fedtune.messages import (
    Assignment,
    ClientUpdate,
    LoraResult,
    Measured,
    Plan,
    Preference,
    Proximal,
    TailRank,
    Training,
    TrainLora,
)
from fedtune.number_formats import to_wire
from fedtune.seeds import generator
from fedtune.tensors import Tensors
from fedtune.wire import codec
from fedtune.wire import tensors as bodies
from fedtune.wire.expect import LARGEST, MAX_COUNT, MAX_RANK
from fedtune.wire.v1 import round_pb2 as pb

A = {"layer.a": np.ones((2, 3), np.float32), "layer.b": np.zeros((3, 2), ml_dtypes.bfloat16)}
ASSIGNMENT = Assignment(
    method="flora",
    round=3,
    seed=2**64 - 1,
    plan=Plan("bank-1", rank=8, scale=2.0, training=Training(batch=4, learning_rate=3e-4, steps=30)),
    task=TrainLora(
        a_key=2**63,
        train="b",
        upload="difference",
        wire_dtype="fp16",
        terms=(TailRank(0.1, 1.0),),
        blobs={"global": A, "local": {}, "saved": {"score.weight": np.zeros((0, 3), np.float32)}},
    ),
    base="9f3c",
)
UPDATE = ClientUpdate(
    client="bank-1",
    round=3,
    num_examples=120,
    result=LoraResult(
        A, saved={"score.weight": np.full((1, 2), np.nan, np.float32)}, base="9f3c", base_dtype="nf4", codes=b"12345678"
    ),
    measured=Measured(seconds=1.5, peak_bytes=2**33, tokens=900, loss_before=2.5, loss_after=2.25, skipped_steps=2),
)
LIMIT = 1 << 20


def bits(tensors: Tensors) -> object:
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in tensors.items()}


def plain(message: Assignment | ClientUpdate) -> object:
    """Return the message with every array as its bits, so that two messages can be compared."""
    if isinstance(message, ClientUpdate):
        return (
            replace(message, result=replace(message.lora, tensors={}, saved={}, scores={}, moments={})),
            bits(message.lora.tensors),
            bits(message.lora.saved),
            bits(message.lora.scores),
            bits(message.lora.moments),
        )
    return replace(message, task=replace(message.lora, blobs={})), {
        role: bits(tensors) for role, tensors in message.lora.blobs.items()
    }


def assignment_again(assignment: Assignment) -> Assignment:
    encoded = codec.encode_assignment(assignment)
    return codec.decode_assignment(encoded.header, encoded.blobs)


def update_again(update: ClientUpdate) -> ClientUpdate:
    data = codec.encode_update(update)
    return codec.decode_update(data, client=update.client, limit_bytes=len(data))


def changed(data: bytes, change: Callable[[Any], object]) -> bytes:
    """Return an encoded update with its header changed."""
    length = int.from_bytes(data[:4], "little")
    body = data[-(-(4 + length) // codec.ALIGNMENT) * codec.ALIGNMENT :]
    header = pb.ClientUpdate.FromString(data[4 : 4 + length])
    change(header)
    front = header.SerializeToString()
    front = len(front).to_bytes(4, "little") + front
    return front + bytes(-len(front) % codec.ALIGNMENT) + body


TENSORS = st.dictionaries(
    st.text(min_size=1, max_size=6),
    st.sampled_from([np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]).flatmap(
        lambda dtype: hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3).map(
            lambda shape: np.arange(np.prod(shape), dtype=np.float32).reshape(shape).astype(dtype)
        )
    ),
    max_size=3,
)
WORD = st.integers(0, 2**64 - 1)
COUNT = st.integers(0, 2**32 - 1)
SIZE = st.integers(0, MAX_COUNT - 1)
TAIL_RANK = st.builds(TailRank, st.floats(0, LARGEST), st.floats(0, 1, exclude_min=True)).filter(
    lambda term: term != TailRank(0, 1)  # which is no term on the wire
)
PROXIMAL = st.builds(Proximal, st.floats(0, LARGEST, exclude_min=True))
PREFERENCE = st.builds(Preference, st.floats(0, LARGEST, exclude_min=True))


@given(
    st.builds(
        Assignment,
        method=st.text(),
        round=COUNT,
        seed=WORD,
        plan=st.builds(
            Plan,
            client=st.text(),
            rank=st.integers(1, MAX_RANK),
            scale=st.floats(0, LARGEST, exclude_min=True),
            training=st.just(ASSIGNMENT.plan.training),
            back=st.floats(0, 0.875),
            base_dtype=st.sampled_from(["", "int8", "nf4"]),
            view=st.sampled_from(["whole", "deployed"]),
        ),
        task=st.builds(
            TrainLora,
            a_key=WORD,
            train=st.sampled_from(["ab", "b"]),
            upload=st.sampled_from(["factors", "difference"]),
            wire_dtype=st.sampled_from(["fp32", "fp16", "bf16", "int8", "int4"]),
            terms=st.tuples(TAIL_RANK | st.none(), PROXIMAL | st.none(), PREFERENCE | st.none()).map(
                lambda terms: tuple(filter(None, terms))
            ),
            blobs=st.dictionaries(st.sampled_from(["global", "local", "moments", "saved"]), TENSORS),
        ),
        base=st.text(),
        date=st.just("") | st.dates().map(lambda day: day.isoformat()),
    )
)
@settings(deadline=None, max_examples=60)
def test_an_assignment_comes_back_exactly(assignment: Assignment) -> None:
    assert plain(assignment_again(assignment)) == plain(assignment)


@given(
    st.builds(
        ClientUpdate,
        client=st.text(),
        round=COUNT,
        num_examples=SIZE,
        result=st.builds(LoraResult, TENSORS, saved=TENSORS, base=st.text(), scores=TENSORS, moments=TENSORS),
        measured=st.builds(
            Measured,
            seconds=st.floats(0, LARGEST),
            peak_bytes=SIZE,
            tokens=SIZE,
            loss_before=st.none() | st.floats(allow_nan=False),
            loss_after=st.none() | st.floats(allow_nan=False),
        ),
    )
)
@settings(deadline=None, max_examples=60)
def test_an_update_comes_back_exactly(update: ClientUpdate) -> None:
    assert plain(update_again(update)) == plain(update)


@pytest.mark.parametrize("day", ["today", "20261129", "2026-02-30", "2026-11-29' + x"])
def test_what_is_no_day_is_refused_before_a_template_is_filled_with_it(day: str) -> None:
    encoded = codec.encode_assignment(replace(ASSIGNMENT, date=day))
    with pytest.raises(WireError, match="a day"):
        codec.decode_assignment(encoded.header, encoded.blobs)


def test_the_fixed_messages_come_back_exactly() -> None:
    assert plain(assignment_again(ASSIGNMENT)) == plain(ASSIGNMENT)
    assert plain(update_again(UPDATE)) == plain(UPDATE)


def test_a_loss_that_is_not_a_number_travels_and_is_not_taken_for_a_missing_one() -> None:
    measured = update_again(replace(UPDATE, measured=Measured(loss_after=float("nan")))).measured
    assert measured.loss_before is None
    assert np.isnan(measured.loss_after or 0.0)


def test_a_state_shared_by_a_cohort_is_encoded_once_and_decoded_once() -> None:
    encode, decode = codec.blob_encoder(), codec.blob_decoder()
    cohort = [replace(ASSIGNMENT, seed=seed, task=replace(ASSIGNMENT.lora, blobs={"global": A})) for seed in (1, 2)]
    first, second = (codec.encode_assignment(assignment, encode=encode) for assignment in cohort)
    assert first.header != second.header
    (one,), (other,) = first.blobs.values(), second.blobs.values()
    assert one is other
    left, right = (codec.decode_assignment(each.header, each.blobs, decode=decode) for each in (first, second))
    assert left.lora.blobs["global"] is right.lora.blobs["global"]
    assert bits(left.lora.blobs["global"]) == bits(A)


def test_a_decoder_that_is_kept_tells_apart_two_descriptions_of_one_body() -> None:
    decode = codec.blob_decoder()
    blob = codec.encode_blob({"a": np.arange(4, dtype=np.float32)})
    renamed = pb.Blob.FromString(blob.header.SerializeToString())
    renamed.tensors[0].name = "b"
    assert set(decode(blob.header, blob.body)) == {"a"}
    assert set(decode(renamed, blob.body)) == {"b"}


def test_equal_tensors_have_one_digest_whatever_their_mapping() -> None:
    assert codec.encode_blob(A).digest == codec.encode_blob(dict(reversed(A.items()))).digest


def test_every_truncated_assignment_is_refused_or_lacks_a_field() -> None:
    encoded = codec.encode_assignment(ASSIGNMENT)
    for length in range(len(encoded.header)):
        # A header cut between two fields is a valid header without the later ones, such as the last blob.
        try:
            decoded = codec.decode_assignment(encoded.header[:length], encoded.blobs)
        except WireError:
            continue
        assert plain(decoded) != plain(ASSIGNMENT)


def test_every_truncated_update_is_refused() -> None:
    data = codec.encode_update(UPDATE)
    for length in range(len(data)):
        with pytest.raises(WireError, match=r"^bank-1: "):
            codec.decode_update(data[:length], client="bank-1", limit_bytes=LIMIT)


def test_an_update_followed_by_more_bytes_is_refused() -> None:
    data = codec.encode_update(UPDATE)
    with pytest.raises(WireError, match="in all"):
        codec.decode_update(data + b"\0", client="bank-1", limit_bytes=LIMIT)


def test_flipped_bits_give_a_wire_error_or_another_message_and_nothing_else() -> None:
    rng = random.Random(0)
    data = codec.encode_update(UPDATE)
    encoded = codec.encode_assignment(ASSIGNMENT)
    for _ in range(3000):
        position, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        flipped = data[:position] + bytes([data[position] ^ bit]) + data[position + 1 :]
        try:
            assert codec.decode_update(flipped, client="bank-1", limit_bytes=LIMIT).client == "bank-1"
        except WireError as error:
            assert str(error).startswith("bank-1: ")  # noqa: PT017  # most flips raise, some make another message
        position = rng.randrange(len(encoded.header))
        header = encoded.header
        flipped = header[:position] + bytes([header[position] ^ bit]) + header[position + 1 :]
        try:
            codec.decode_assignment(flipped, encoded.blobs)
        except WireError:
            continue


@given(st.binary(max_size=300))
@settings(deadline=None)
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(WireError):
        codec.decode_update(data, client="bank-1", limit_bytes=LIMIT)
    with pytest.raises(WireError):
        codec.decode_assignment(data, {})


def test_a_flipped_bit_in_a_body_of_an_assignment_is_found_by_its_digest() -> None:
    encoded = codec.encode_assignment(replace(ASSIGNMENT, task=replace(ASSIGNMENT.lora, blobs={"global": A})))
    ((digest, body),) = encoded.blobs.items()
    with pytest.raises(WireError, match=f"digest '{digest}'"):
        codec.decode_assignment(encoded.header, {digest: bytes([body[0] ^ 1]) + body[1:]})


def test_a_missing_body_is_named_by_its_role() -> None:
    encoded = codec.encode_assignment(replace(ASSIGNMENT, task=replace(ASSIGNMENT.lora, blobs={"global": A})))
    with pytest.raises(WireError, match="'global': expected a body of digest"):
        codec.decode_assignment(encoded.header, {})


def test_an_update_that_names_another_client_is_refused() -> None:
    data = codec.encode_update(UPDATE)
    with pytest.raises(WireError, match=r"^bank-2: expected an update of this client; got one of 'bank-1'"):
        codec.decode_update(data, client="bank-2", limit_bytes=LIMIT)


def test_an_update_above_the_limit_is_not_read() -> None:
    data = codec.encode_update(UPDATE)
    with pytest.raises(WireError, match=f"at most {len(data) - 1} bytes; got {len(data)}"):
        codec.decode_update(data, client="bank-1", limit_bytes=len(data) - 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.parts.pop(), "parts tensors and saved"),
        (lambda header: header.parts.add(role="more"), "parts tensors and saved"),
        (lambda header: setattr(header.parts[0], "num_bytes", 2**64 - 1), "in all"),
        (lambda header: setattr(header.parts[0], "num_bytes", header.parts[0].num_bytes - 1), "in all"),
        (lambda header: header.parts[0].tensors[0].shape.append(2**31), "expected at most|as its tensors need"),
        (lambda header: header.parts[0].tensors[1].MergeFrom(header.parts[0].tensors[0]), "sorted"),
        (lambda header: setattr(header.parts[0].tensors[0], "dtype", 77), "number format"),
        (lambda header: setattr(header.measured, "seconds", float("nan")), "time"),
        (lambda header: setattr(header.measured, "seconds", -1.0), "time"),
        (lambda header: header.MergeFromString(b"\xf8\x07\x01"), "fields of ClientUpdate of this release"),
        (lambda header: header.parts[0].MergeFromString(b"\xf8\x07\x01"), "fields of ClientUpdate of this release"),
    ],
    ids=[
        *("part missing", "part too many", "huge part", "short part", "huge shape", "repeated name", "number format"),
        *("NaN seconds", "negative seconds", "unknown field", "unknown field within"),
    ],
)
def test_an_update_whose_header_lies_is_refused(change: Callable[[Any], object], message: str) -> None:
    data = changed(codec.encode_update(UPDATE), change)
    with pytest.raises(WireError, match=message):
        codec.decode_update(data, client="bank-1", limit_bytes=LIMIT)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda header: setattr(header, "verb", 9),
            r"verb ADAPT \(1\), PROBE \(2\), DESCEND \(4\) or SUM \(5\); got 9",
        ),
        (lambda header: setattr(header, "verb", pb.PROBE), "probe: expected seeds from 1 to 4096; got 0"),
        (lambda header: header.ClearField("verb"), "verb ADAPT"),
        (lambda header: header.ClearField("plan"), "rank >= 1"),
        (lambda header: setattr(header.plan, "scale", float("nan")), "scale > 0"),
        (lambda header: setattr(header.plan, "scale", float("inf")), "scale > 0"),
        (lambda header: setattr(header.local, "train", 9), "train"),
        (lambda header: setattr(header.local, "wire_dtype", pb.I16), "wire_dtype"),
        (lambda header: header.local.ClearField("upload"), "upload"),
        (lambda header: setattr(header.local, "rank_penalty", -1.0), "rank_penalty"),
        (lambda header: setattr(header.local, "rank_decay", float("nan")), "rank_decay"),
        (lambda header: setattr(header.local, "proximal", -0.1), "proximal"),
        (lambda header: setattr(header.local, "proximal", float("inf")), "proximal"),
        (lambda header: setattr(header.local, "proximal", float("nan")), "proximal"),
        (lambda header: setattr(header.local, "preference_beta", -0.1), "preference_beta"),
        (lambda header: setattr(header.local, "preference_beta", float("inf")), "preference_beta"),
        (lambda header: setattr(header.local, "preference_beta", float("nan")), "preference_beta"),
        (lambda header: setattr(header, "settings", b"{}"), "settings"),
        (lambda header: header.down.append(header.down[0]), "each role once"),
        (lambda header: setattr(header.down[0], "digest", b""), "digest"),
        (lambda header: setattr(header.down[0], "num_bytes", 1), "body of 1 bytes"),
        (lambda header: header.MergeFromString(b"\xf8\x07\x01"), "fields of Assignment of this release"),
    ],
    ids=[
        *(
            "verb of another release",
            "probe without one",
            "no verb",
            "no plan",
            "NaN scale",
            "infinite scale",
            "train",
            "wire_dtype",
        ),
        *("no upload", "penalty", "decay", "negative proximal", "infinite proximal", "NaN proximal"),
        *("negative beta", "infinite beta", "NaN beta", "settings"),
        *("role twice", "no digest", "length", "unknown field"),
    ],
)
def test_an_assignment_whose_header_lies_is_refused(change: Callable[[Any], object], message: str) -> None:
    encoded = codec.encode_assignment(ASSIGNMENT)
    header = pb.Assignment.FromString(encoded.header)
    change(header)
    with pytest.raises(WireError, match=message):
        codec.decode_assignment(header.SerializeToString(), encoded.blobs)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda header: setattr(header.probe, "steps", 10**9), "ADAPT; got probe"),
        (lambda header: setattr(header.score, "examples", 1), "ADAPT; got score"),
    ],
)
def test_fields_of_another_verb_are_refused(change: Callable[[Any], object], named: str) -> None:
    """A site holds what it reads against its recipe: nothing else may travel in an order."""
    encoded = codec.encode_assignment(ASSIGNMENT)
    header = pb.Assignment.FromString(encoded.header)
    change(header)
    with pytest.raises(WireError, match=f"the fields of the verb {named}"):
        codec.decode_outline(header.SerializeToString())


@pytest.mark.parametrize("length", [2**32 - 1, codec.MAX_HEADER_BYTES])
def test_a_huge_declared_header_takes_no_memory(length: int) -> None:
    data = length.to_bytes(4, "little") + bytes(200)
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=re.escape(f"header of {length} bytes")):
            codec.decode_update(data, client="bank-1", limit_bytes=LIMIT)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_header_above_the_limit_is_not_parsed() -> None:
    length = codec.MAX_HEADER_BYTES + 1
    data = length.to_bytes(4, "little") + bytes(length + codec.ALIGNMENT)
    with pytest.raises(WireError, match=f"header of at most {length - 1} bytes; got {length}"):
        codec.decode_update(data, client="bank-1", limit_bytes=len(data))


def test_padding_that_is_not_zero_is_refused() -> None:
    data = bytearray(codec.encode_update(UPDATE))
    end = 4 + int.from_bytes(data[:4], "little")
    assert end % codec.ALIGNMENT, "this test needs a header that is padded"
    data[end] = 1
    with pytest.raises(WireError, match="padded by zeros"):
        codec.decode_update(bytes(data), client="bank-1", limit_bytes=LIMIT)


def test_bodies_of_an_update_start_aligned_so_that_nothing_is_copied() -> None:
    data = codec.encode_update(
        replace(UPDATE, result=replace(UPDATE.lora, tensors={"a": np.ones((2, 2), np.float32)}, saved={}))
    )
    decoded = codec.decode_update(data, client="bank-1", limit_bytes=LIMIT)
    assert np.shares_memory(decoded.lora.tensors["a"], np.frombuffer(data, np.uint8))
    assert not decoded.lora.tensors["a"].flags.writeable


def coded_update(dtype: str = "int4") -> ClientUpdate:
    rng = generator(5)
    tensors = {f"layer.{i}.{side}": rng.standard_normal((8, 200)).astype(np.float32) for i in range(3) for side in "ab"}
    return ClientUpdate("ann", 1, 10, LoraResult(to_wire(tensors, dtype, key=1)))


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_codes_travel_as_they_are_in_fewer_bytes_than_they_have(dtype: str) -> None:
    sent = coded_update(dtype)
    data = codec.encode_update(sent)
    got = codec.decode_update(data, client="ann", limit_bytes=2 * len(data))
    assert got.lora.tensors.keys() == sent.lora.tensors.keys()
    for name, array in sent.lora.tensors.items():
        assert got.lora.tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(got.lora.tensors[name], array)
    # 4800 * 2 numbers; a plain body and its names would be larger.
    assert len(data) < (0.28 if dtype == "int8" else 0.16) * 4 * 9600


@pytest.mark.guarantee("G4")
def test_an_update_that_would_inflate_beyond_its_limit_is_refused_before_it_does() -> None:
    data = codec.encode_update(coded_update())
    with pytest.raises(WireError, match=r"ann: .*once inflated"):
        codec.decode_update(data, client="ann", limit_bytes=len(data))


def header_of(data: bytes) -> tuple[pb.ClientUpdate, bytes]:
    """Return header and bodies of an update."""
    length = int.from_bytes(data[:4], "little")
    return pb.ClientUpdate.FromString(data[4 : 4 + length]), data[-(-(4 + length) // 64) * 64 :]


def with_header(header: pb.ClientUpdate, body: bytes) -> bytes:
    front = header.SerializeToString()
    front = len(front).to_bytes(4, "little") + front
    return front + bytes(-len(front) % 64) + body


@pytest.mark.guarantee("G4")
def test_deflated_parts_that_are_none_are_refused() -> None:
    header, body = header_of(codec.encode_update(coded_update()))
    parts = pb.ClientUpdate.FromString(zlib.decompress(header.deflated_parts, wbits=-15))

    def refused(match: str, **changes: Any) -> None:
        spoilt = pb.ClientUpdate()
        spoilt.CopyFrom(header)
        for name, value in changes.items():
            setattr(spoilt, name, value)
        with pytest.raises(WireError, match=match):
            codec.decode_update(with_header(spoilt, body), client="ann", limit_bytes=2**20)

    def deflated(message: pb.ClientUpdate) -> bytes:
        return zlib.compress(message.SerializeToString(), wbits=-15)

    assert codec.decode_update(with_header(header, body), client="ann", limit_bytes=2**20).lora.tensors
    refused("deflated body", deflated_parts=b"\xff\xff\xff")
    refused("once inflated", deflated_parts=header.deflated_parts[:-1])
    refused("once inflated", deflated_parts=header.deflated_parts + b"x")
    refused("once inflated", deflated_parts=zlib.compress(bytes(2**26), wbits=-15))
    refused("nothing but parts", deflated_parts=deflated(pb.ClientUpdate(parts=parts.parts, examples=3)))
    refused("the parts tensors and saved", deflated_parts=deflated(pb.ClientUpdate(parts=parts.parts[:1])))
    parts.parts[0].deflated += 1
    refused("bodies of", deflated_parts=deflated(parts))
    parts.parts[0].deflated -= 1
    parts.parts[0].num_bytes += 1
    refused("once inflated|a body of", deflated_parts=deflated(parts))
    twice = pb.ClientUpdate()
    twice.CopyFrom(header)
    twice.parts.extend(parts.parts)
    with pytest.raises(WireError, match="the parts once"):
        codec.decode_update(with_header(twice, body), client="ann", limit_bytes=2**20)


def test_a_deflated_body_in_an_assignment_is_refused() -> None:
    blob = codec.encode_blob({"x": np.zeros(3, np.float32)})
    header = pb.Blob()
    header.CopyFrom(blob.header)
    header.deflated = 5
    with pytest.raises(WireError, match="as it is"):
        codec.decode_blob(header, blob.body)


def planned(**changes: Any) -> bytes:
    """Return the header of an assignment with its plan's numbers changed after the encoding."""
    message = pb.Assignment.FromString(codec.encode_assignment(ASSIGNMENT).header)
    for name, value in changes.items():
        if name == "ranks":
            message.plan.ranks.extend(value)
        else:
            setattr(message.plan, name, value)
    return message.SerializeToString()


def test_what_a_plan_says_of_modules_and_backward_passes_arrives() -> None:
    plan = replace(ASSIGNMENT.plan, ranks=(0, 8, 3), back=0.5, base_dtype="nf4", view="deployed")
    assert assignment_again(replace(ASSIGNMENT, plan=plan)).plan == plan


def test_a_plan_without_them_has_the_bytes_of_earlier_releases() -> None:
    plan = pb.Assignment.FromString(codec.encode_assignment(ASSIGNMENT).header).plan
    assert {field.number for field, _ in plan.ListFields()} == {1, 8, 9}


@pytest.mark.guarantee("G2")
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"ranks": [0] * 3}, "the largest being the plan's 8; got 3, the largest 0"),
        ({"ranks": [9, 8]}, "the largest being the plan's 8; got 2, the largest 9"),
        ({"ranks": [2**32 - 1]}, "the largest being the plan's 8"),
        ({"ranks": [8] * 20_001}, "at most 20000 ranks of modules"),
        ({"back": 0.9}, "a share from 0 to 0.875 left out of the backward pass; got 0.9"),
        ({"back": -0.1}, "left out of the backward pass"),
        ({"back": float("nan")}, "left out of the backward pass; got nan"),
        ({"base_dtype": 7}, "base_dtype"),
        ({"view": 9}, "view"),
    ],
)
def test_a_plan_beyond_what_any_client_could_do_is_refused(changes: Any, expected: str) -> None:
    with pytest.raises(WireError, match=re.escape(expected)):
        codec.decode_assignment(planned(**changes), codec.encode_assignment(ASSIGNMENT).blobs)


def test_losses_of_the_whole_model_arrive_where_they_were_measured() -> None:
    measured = replace(UPDATE.measured, whole_loss_before=3.5, whole_loss_after=3.25)
    assert update_again(replace(UPDATE, measured=measured)).measured == measured
    assert update_again(UPDATE).measured == UPDATE.measured


def test_shares_of_modules_and_the_wish_for_them_arrive() -> None:
    order = replace(ASSIGNMENT, plan=replace(ASSIGNMENT.plan, importance="gain"))
    encoded = codec.encode_assignment(order)
    assert codec.decode_assignment(encoded.header, encoded.blobs).plan.importance == "gain"
    measured = replace(UPDATE.measured, module_importance=(0.75, 0.25, 0.0))
    assert update_again(replace(UPDATE, measured=measured)).measured == measured
    # Whether they may be used is for the admission to say.
    odd = update_again(replace(UPDATE, measured=replace(measured, module_importance=(float("nan"), -1.0)))).measured
    assert np.isnan(odd.module_importance[0])
    assert odd.module_importance[1] == -1.0


def test_joules_arrive_where_they_were_sent_and_no_others() -> None:
    measured = replace(UPDATE.measured, joules=0.0)
    assert update_again(replace(UPDATE, measured=measured)).measured.joules == 0.0
    assert update_again(UPDATE).measured.joules is None
    for wrong in (float("nan"), float("inf"), -1.0):
        with pytest.raises(WireError, match="an energy of at least 0 J"):
            update_again(replace(UPDATE, measured=replace(measured, joules=wrong)))


def test_more_shares_than_any_base_has_modules_are_refused() -> None:
    endless = replace(UPDATE, measured=replace(UPDATE.measured, module_importance=(0.0,) * (bodies.MAX_TENSORS + 1)))
    with pytest.raises(WireError, match=f"at most {bodies.MAX_TENSORS} shares"):
        update_again(endless)
