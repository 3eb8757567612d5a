from __future__ import annotations

import tracemalloc
import zlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fedtune.errors import WireError
from fedtune.tensors import Array, Tensors
from fedtune.wire import tensors as bodies
from fedtune.wire.v1.round_pb2 import BF16, F32, I4, U8, DType, TensorSpec


def same(left: Tensors, right: Tensors) -> bool:
    """Say whether names, number formats, shapes and bits agree, NaN payloads too."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and left[name].tobytes() == right[name].tobytes()
        for name in left
    )


def spec(name: str, shape: tuple[int, ...], dtype: DType = F32) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    dtype: np.dtype[Any] = draw(st.sampled_from(list(bodies.WIRE)))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4))
    size = int(np.prod(shape)) * dtype.itemsize
    entries = np.frombuffer(draw(st.binary(min_size=size, max_size=size)), np.uint8)
    # The upper half of a byte says nothing of a number of 4 bits.
    array: Array = (entries & 0xF if dtype == bodies.NUMPY[I4] else entries).view(dtype).reshape(shape)
    return array


@given(st.dictionaries(st.text(min_size=1, max_size=8), arrays(), max_size=5))
@settings(deadline=None)
def test_decoding_what_was_encoded_gives_every_bit_back(tensors: Tensors) -> None:
    specs, body = bodies.encode(tensors)
    assert same(bodies.decode(specs, body), tensors)


def test_the_body_is_the_little_endian_entries_in_order_of_the_names() -> None:
    specs, body = bodies.encode({"b": np.array([1, 2], np.int16), "a": np.array([1.0], ml_dtypes.bfloat16)})
    assert [one.name for one in specs] == ["a", "b"]
    assert body == bytes.fromhex("803f 0100 0200")
    assert bodies.digest(b"").hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_two_numbers_of_4_bits_share_a_byte_and_an_odd_one_has_zero_beside_it() -> None:
    specs, body = bodies.encode({"a": np.array([1, -1, -7], ml_dtypes.int4)})
    assert body == bytes.fromhex("f1 09")
    assert bodies.decode(specs, body)["a"].astype(int).tolist() == [1, -1, -7]
    with pytest.raises(WireError, match="zero after the last entry of 'a'"):
        bodies.decode(specs, bytes.fromhex("f1 19"))
    assert bodies.outline(specs, 2)["a"].shape == (3,)


def test_what_is_deflated_inflates_to_its_size_and_to_no_byte_more() -> None:
    body = bytes(range(16)) * 500
    small = memoryview(bodies.deflate(body))
    assert len(small) < len(body)
    assert bytes(bodies.inflate(small, len(body), "tensors")) == body
    assert bytes(bodies.inflate(memoryview(bodies.deflate(b"")), 0, "tensors")) == b""
    for data, size in [(small, len(body) - 1), (small, len(body) + 1), (small[:-1], len(body)), (small, 0)]:
        with pytest.raises(WireError, match=f"of {size} bytes once inflated"):
            bodies.inflate(data, size, "tensors")
    with pytest.raises(WireError, match="once inflated"):
        bodies.inflate(memoryview(bytes(small) + b"x"), len(body), "tensors")
    with pytest.raises(WireError, match="of others"):
        bodies.inflate(memoryview(b"\xff" * 9), 9, "tensors")


@pytest.mark.guarantee("G4")
def test_a_bomb_takes_no_more_memory_than_it_names() -> None:
    bomb = memoryview(zlib.compress(bytes(2**24), wbits=-15))
    tracemalloc.start()
    with pytest.raises(WireError, match="once inflated"):
        bodies.inflate(bomb, 1000, "tensors")
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_a_transposed_array_travels_in_row_major_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    specs, body = bodies.encode({"a": array})
    assert np.array_equal(bodies.decode(specs, body)["a"], array)


def test_decoded_tensors_are_read_only_views_of_the_body() -> None:
    body = bytearray(16)
    array = bodies.decode([spec("a", (4,))], memoryview(body))["a"]
    assert not array.flags.writeable
    body[3] = 0x40
    assert array[0] == 2.0


def test_a_tensor_off_its_alignment_is_copied_to_one() -> None:
    tensors = {"a": np.ones(1, ml_dtypes.bfloat16), "b": np.ones(2, np.float32)}
    decoded = bodies.decode(*bodies.encode(tensors))
    assert same(decoded, tensors)
    assert decoded["b"].flags.aligned
    assert not decoded["b"].flags.writeable


def test_not_a_number_travels() -> None:
    tensors = {"a": np.array([np.nan, np.inf], np.float32)}
    assert same(bodies.decode(*bodies.encode(tensors)), tensors)


@pytest.mark.parametrize(
    "array",
    [np.zeros(2), np.zeros(2, ">f4"), np.zeros(1, np.complex64), np.array(["text"]), np.zeros((1,) * 9, np.float32)],
    ids=["float64", "big-endian", "complex", "text", "nine axes"],
)
def test_what_cannot_travel_is_refused_by_name(array: Array) -> None:
    with pytest.raises(WireError, match=r"'layer\.a'"):
        bodies.encode({"layer.a": array})


def test_a_tensor_without_a_name_is_refused_on_both_sides() -> None:
    with pytest.raises(WireError, match="name"):
        bodies.encode({"": np.zeros(1, np.float32)})
    with pytest.raises(WireError, match="name"):
        bodies.decode([spec("", (1,))], bytes(4))


@pytest.mark.parametrize("names", [("a", "a"), ("b", "a")])
def test_names_that_repeat_or_are_out_of_order_are_refused(names: tuple[str, str]) -> None:
    with pytest.raises(WireError, match="unique, sorted"):
        bodies.decode([spec(name, (1,)) for name in names], bytes(8))


@pytest.mark.parametrize("length", [0, 7, 9, 12])
def test_a_body_of_another_length_is_refused(length: int) -> None:
    with pytest.raises(WireError, match=f"8 bytes.*got {length} bytes"):
        bodies.decode([spec("a", (2,))], bytes(length))


@pytest.mark.parametrize("number", [0, 11, -1, 2**31 - 1])
def test_an_unknown_number_format_is_refused(number: int) -> None:
    one = TensorSpec(name="a", shape=[1])
    one.dtype = number  # type: ignore[assignment]  # open enums carry any 32-bit number
    with pytest.raises(WireError, match="number format"):
        bodies.decode([one], bytes(4))


@pytest.mark.parametrize(
    "shape",
    [(2**32 - 1,) * 8, (2**31, 0), (2**32 - 1,) * 7 + (0,), (1,) * 9, (2**32 - 1,)],
    ids=["all axes huge", "huge beside zero", "huge seven times beside zero", "nine axes", "one huge axis"],
)
def test_a_huge_declared_shape_takes_no_memory(shape: tuple[int, ...]) -> None:
    tracemalloc.start()
    try:
        if shape == (2**31, 0):  # 8 GiB if the other axis had one entry: without any, it is nothing
            assert bodies.decode([spec("a", shape)], b"")["a"].size == 0
        else:
            with pytest.raises(WireError):
                bodies.decode([spec("a", shape)], b"")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_ninth_axis_is_refused_even_if_the_body_fits() -> None:
    with pytest.raises(WireError, match="8 axes"):
        bodies.decode([spec("a", (1,) * 9)], bytes(4))


def test_more_tensors_than_the_limit_are_refused() -> None:
    with pytest.raises(WireError, match="20000 tensors"):
        bodies.decode([spec("a", (0,))] * (bodies.MAX_TENSORS + 1), b"")


def test_every_number_format_of_the_schema_but_the_unset_one_is_known() -> None:
    assert set(bodies.NUMPY) == set(DType.values()) - {0}
    assert bodies.NUMPY[BF16].itemsize == 2
    assert bodies.NUMPY[U8] == np.uint8
