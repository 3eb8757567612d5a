from __future__ import annotations

from contextlib import suppress
from io import BytesIO
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fedtune.errors import WireError
from fedtune.flower.peft_records import PeftState, from_record, only_array_record, read_array, to_record
from tests.flower.conftest import carried
from tests.flower.stock_app import answer, first_state

KEY = "base_model.model.m.q.lora_A.weight"


def test_a_state_is_written_under_the_names_that_peft_gives_it() -> None:
    record = to_record(first_state(2))
    assert sorted(record) == [f"base_model.model.m.{one}.lora_{side}.weight" for one in "qv" for side in "AB"]
    assert record[KEY].numpy().shape == (2, 10)


def test_a_state_arrives_as_it_was_sent() -> None:
    from flwr.app import Message, MessageType

    state = PeftState(first_state(3, trained=True).factors, {"score.weight": np.ones((2, 4), np.float32)})
    arrived = carried(Message(RecordDict({"arrays": to_record(state)}), 7, MessageType.TRAIN)).content
    read = from_record(only_array_record(arrived, "arrays"))
    assert (read.ranks, read.modules) == ({"m.q": 3, "m.v": 3}, {"m.q": (12, 10), "m.v": (9, 10)})
    assert all(np.array_equal(read.factors[key], array) for key, array in state.factors.items())
    assert np.array_equal(read.saved["score.weight"], np.ones((2, 4)))


def test_names_without_pefts_prefix_keep_their_form() -> None:
    state = PeftState(first_state(2).factors, {}, prefix="")
    assert from_record(to_record(state)).prefix == ""
    assert "m.q.lora_A.weight" in to_record(state)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, np.float32])
def test_numbers_of_other_floats_become_float32(dtype: type) -> None:
    array: Any = np.arange(6, dtype=dtype).reshape(2, 3).T
    read = read_array("x", Array(array))
    assert read.dtype == np.float32
    assert np.array_equal(read, array)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (
            Array(np.ones((2, 3)).astype(ml_dtypes.bfloat16)),
            "x: expected numbers of float32, float16, float64; got bfloat16; send tensor.float() of every tensor",
        ),
        (Array(np.ones((2, 3), np.int64)), "got int64"),
        (Array("float32", (2, 3), "fedtune.raw", b"\0" * 24), "expected an array of numpy; got one of 'fedtune.raw'"),
        (Array("float32", (2, 3), "numpy.ndarray", b"PK\x03\x04 a zip"), "expected an array of numpy"),
        (Array("float32", (2, 3), "numpy.ndarray", b"\x93NUMPY\x01\x00"), "got one that cannot be read"),
    ],
)
def test_an_array_that_is_no_float_or_no_array_is_refused_in_one_sentence(array: Array, sentence: str) -> None:
    with pytest.raises(WireError) as refused:
        read_array("x", array)
    assert sentence in str(refused.value)
    assert str(refused.value).startswith("x: expected ")


def test_a_head_that_says_more_than_there_is_takes_no_memory() -> None:
    body = BytesIO()
    np.lib.format.write_array_header_1_0(body, {"shape": (2**40,), "fortran_order": False, "descr": "<f4"})
    with pytest.raises(WireError, match="expected 1099511627776 numbers of float32; got 0 bytes"):
        read_array("x", Array("float32", (2,), "numpy.ndarray", body.getvalue()))


@pytest.mark.parametrize(
    "shape",
    [(0, 10**30), (1,) * 65, (True, True), (10**3000, 10**3000), (-(10**3000), 10**3000), (-1, -1)],
    ids=["beyond 64 bits", "axes", "bool", "long product", "long negative", "negative"],
)
def test_a_shape_that_no_array_has_is_refused(shape: tuple[int, ...]) -> None:
    body = BytesIO()
    np.lib.format.write_array_header_1_0(body, {"shape": shape, "fortran_order": False, "descr": "<f4"})
    with pytest.raises(WireError, match=r"^x: expected ") as refused:
        read_array("x", Array("float32", (1,), "numpy.ndarray", body.getvalue() + bytes(4)))
    assert len(str(refused.value)) < 200


@given(st.binary(max_size=80), st.integers(0, 200))
def test_any_bytes_are_an_array_or_refused(noise: bytes, cut: int) -> None:
    good = Array(np.ones((2, 3), np.float32)).data
    for data in (b"\x93NUMPY" + noise, good[:cut], good[:cut] + noise):
        with suppress(WireError):
            read_array("x", Array("float32", (2, 3), "numpy.ndarray", data))


@pytest.mark.parametrize(
    ("name", "shape", "sentence"),
    [
        ("m.q.lora_magnitude_vector", (12,), "got another part of an adapter; train without it"),
        ("m.q.lora_embedding_A", (2, 12), "got another part of an adapter"),
        ("m.q.lora_A.weight", (2, 10, 3, 3), "expected a matrix; got shape (2, 10, 3, 3); adapt linear layers alone"),
        ("m.x.lora_A.weight", (2, 10), "m.x: expected both factors lora_A and lora_B; got one of them"),
    ],
)
def test_what_is_no_pair_of_factors_is_refused(name: str, shape: tuple[int, ...], sentence: str) -> None:
    record = to_record(first_state(2))
    record[f"base_model.model.{name}"] = Array(np.zeros(shape, np.float32))
    with pytest.raises(WireError) as refused:
        from_record(record)
    assert sentence in str(refused.value)


def test_a_reply_holds_one_record_of_arrays_under_the_name_that_was_sent() -> None:
    content = answer(first_state(2))
    with pytest.raises(WireError, match=r"expected one ArrayRecord, 'weights'; got \['arrays'\]"):
        only_array_record(content, "weights")
    content["more"] = ArrayRecord()
    with pytest.raises(WireError, match="expected one ArrayRecord"):
        only_array_record(content, "arrays")
    with pytest.raises(WireError, match="got none"):
        only_array_record(RecordDict({"metrics": MetricRecord()}), "arrays")
