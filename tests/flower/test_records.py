from __future__ import annotations

import mmap
import tempfile

import ml_dtypes
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

from fedtune.errors import WireError
from fedtune.flower.records import HEADER, STYPE, TENSORS, arrays, pack, raw, unpack
from fedtune.wire.codec import decode_blob, encode_blob
from tests.flower.conftest import carried


def journey(content: RecordDict) -> RecordDict:
    return carried(Message(content, 7, MessageType.TRAIN)).content


def test_a_header_and_its_bodies_arrive_as_they_were_sent() -> None:
    header, bodies = bytes(range(256)), {"0f": b"\x00\xff" * 5000, "empty": b""}
    arrived = unpack(journey(pack(header, bodies)))
    assert (arrived.header, arrived.blobs) == (header, bodies)


def test_an_empty_header_and_no_body_arrive() -> None:
    arrived = unpack(journey(pack(b"", {})))
    assert (arrived.header, arrived.blobs) == (b"", {})


@pytest.mark.parametrize("dtype", ["<f4", "<f2", ml_dtypes.bfloat16, "<i4", "<i2", "i1", "u1", "<u4", "<u8"])
def test_every_number_format_arrives_bit_by_bit(dtype: str) -> None:
    tensors = {
        "scalar": np.array(3).astype(dtype),
        "none": np.zeros((0, 3)).astype(dtype),
        "turned": np.arange(12).reshape(3, 4).astype(dtype).T,
    }
    blob = encode_blob(tensors)
    arrived = unpack(journey(pack(b"h", {blob.digest: blob.body}))).blobs[blob.digest]
    for name, tensor in decode_blob(blob.header, arrived).items():
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)
        assert tensor.tobytes() == tensors[name].tobytes()


def test_a_body_longer_than_flowers_chunks_arrives() -> None:
    body = np.random.default_rng(0).bytes(11 * 2**20 + 3)
    assert unpack(journey(pack(b"", {"x": body}))).blobs["x"] == body


def test_a_body_that_lies_in_a_mapped_file_is_copied_once() -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"weights")
        file.flush()
        with mmap.mmap(file.fileno(), 0) as mapped:
            content = pack(b"", {"x": bytes(mapped)})
    assert unpack(content).blobs == {"x": b"weights"}


def test_messages_that_share_a_body_share_what_flower_has_hashed() -> None:
    array, body = arrays(), b"x" * 100
    first, second = (pack(b"", {"d": body}, array=array)[TENSORS] for _ in range(2))
    assert isinstance(first, ArrayRecord)
    assert isinstance(second, ArrayRecord)
    assert first["d"] is second["d"]
    hashed = first["d"].slice_array()
    assert second["d"].slice_array() is hashed


def test_equal_bodies_are_one_object_to_a_superlink() -> None:
    array = arrays()
    sent = [Message(pack(b"%d" % node, {"d": b"x" * 100}, array=array), node, MessageType.TRAIN) for node in (7, 8)]
    assert (
        len(get_all_nested_objects(sent[0]).keys() & get_all_nested_objects(sent[1]).keys()) == 3
    )  # record, array, chunk


@pytest.mark.parametrize(
    "content",
    [
        RecordDict(),
        RecordDict({HEADER: ConfigRecord({"proto": b""})}),
        RecordDict({HEADER: ArrayRecord(), TENSORS: ArrayRecord()}),
        RecordDict({HEADER: ConfigRecord({"proto": b""}), TENSORS: MetricRecord()}),
        RecordDict({HEADER: ConfigRecord({"proto": b""}), TENSORS: ArrayRecord(), "more": ArrayRecord()}),
        RecordDict({HEADER: ConfigRecord({"proto": "text"}), TENSORS: ArrayRecord()}),
        RecordDict({HEADER: ConfigRecord({"proto": b"", "more": 1}), TENSORS: ArrayRecord()}),
        RecordDict({HEADER: ConfigRecord({"proto": b""}), TENSORS: ArrayRecord({"x": Array(np.ones(3))})}),
    ],
)
def test_records_of_another_layout_are_refused(content: RecordDict) -> None:
    with pytest.raises(WireError, match="expected"):
        unpack(content)


def test_an_array_is_raw_bytes() -> None:
    array = raw(b"abc")
    assert (array.dtype, array.shape, array.stype, array.data) == ("uint8", (3,), STYPE, b"abc")
