"""Named tensors as one contiguous little-endian body and the specs that describe it, checked before it is read."""

from __future__ import annotations

import hashlib
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from fedtune.errors import WireError
from fedtune.tensors import Array, Tensors
from fedtune.wire.expect import expect
from fedtune.wire.v1.round_pb2 import DType, TensorSpec

# Limits that hold before memory is taken: a few bytes of header can name any shape.
MAX_TENSORS = 20_000
MAX_AXES = 8
MAX_BODY_BYTES = 1 << 40

NUMPY: Mapping[DType, np.dtype[Any]] = {
    DType.F32: np.dtype("<f4"),
    DType.F16: np.dtype("<f2"),
    DType.BF16: np.dtype(ml_dtypes.bfloat16),
    DType.I32: np.dtype("<i4"),
    DType.I16: np.dtype("<i2"),
    DType.I8: np.dtype("i1"),
    DType.U8: np.dtype("u1"),
    DType.U32: np.dtype("<u4"),
    DType.U64: np.dtype("<u8"),
    DType.I4: np.dtype(ml_dtypes.int4),
}
"""The number formats that travel, by their number in the schema."""

FOUR_BITS = NUMPY[DType.I4]

WIRE: Mapping[np.dtype[Any], DType] = {dtype: number for number, dtype in NUMPY.items()}


def encode(tensors: Tensors) -> tuple[Sequence[TensorSpec], bytes]:
    """Return the specs in order of the names, and the entries of all tensors, row-major and without gaps.

    Raises:
        WireError: if a tensor has a number format that does not travel, more than 8 axes or no name.
    """
    specs, entries = [], []
    for name in sorted(tensors):
        array = tensors[name]
        if array.dtype not in WIRE or array.ndim > MAX_AXES or not name:
            raise WireError(
                f"{name!r}: expected a name, at most {MAX_AXES} axes and one of {[str(dtype) for dtype in WIRE]}; "
                f"got {array.ndim} axes of {array.dtype}; cast it before it is sent"
            )
        specs.append(TensorSpec(name=name, dtype=WIRE[array.dtype], shape=array.shape))
        # As plain bytes, because bfloat16 is unknown to the buffer protocol.
        flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        entries.append((pack_halves(flat) if array.dtype == FOUR_BITS else flat).data)
    return specs, b"".join(entries)


def decode(specs: Sequence[TensorSpec], body: bytes | memoryview) -> Tensors:
    """Return the tensors of a body as read-only views of it; copied are those of 4 bits or off their alignment.

    Raises:
        WireError: if the specs are not those of this body, to the byte, or break a limit of this module.
    """
    expect(len(specs) <= MAX_TENSORS, f"at most {MAX_TENSORS} tensors", len(specs))
    layout = _layout(specs, len(body))
    # Read-only, because clients in one process share a body: one that wrote into it would change the others' start.
    view = memoryview(body).toreadonly()
    tensors: dict[str, Array] = {}
    for name, dtype, shape, offset in layout:
        if dtype == FOUR_BITS:
            size = math.prod(shape)
            packed = np.ndarray((num_bytes(size, dtype),), np.uint8, buffer=view, offset=offset)
            tensors[name] = unpack_halves(packed, size, name).view(dtype).reshape(shape)
            tensors[name].flags.writeable = False
            continue
        array: Array = np.ndarray(shape, dtype, buffer=view, offset=offset)
        # Else numpy would copy it at every use: arithmetic on unaligned arrays goes through buffers.
        if not array.flags.aligned:
            array = array.copy()
            array.flags.writeable = False
        tensors[name] = array
    return tensors


def outline(specs: Sequence[TensorSpec], length: int) -> Tensors:
    """Return the tensors of a body that is not here, with zeros for its entries, which take no memory.

    Raises:
        WireError: as `decode`.
    """
    expect(len(specs) <= MAX_TENSORS, f"at most {MAX_TENSORS} tensors", len(specs))
    return {name: np.broadcast_to(np.zeros((), dtype), shape) for name, dtype, shape, _ in _layout(specs, length)}


def _layout(specs: Sequence[TensorSpec], length: int) -> Sequence[tuple[str, np.dtype[Any], tuple[int, ...], int]]:
    """Return name, number format, shape and offset of each tensor, having checked that they fill `length` bytes."""
    layout, offset, previous = [], 0, ""
    for spec in specs:
        name, dtype, shape = spec.name, NUMPY.get(spec.dtype), tuple(spec.shape)
        # Sorted, so that one set of tensors has one encoding and one digest.
        expect(previous < name, "unique, sorted tensor names, none empty", f"{name!r} after {previous!r}")
        if dtype is None:
            raise WireError(f"{name!r}: expected a number format from 1 to {max(NUMPY)}; got {spec.dtype}")
        size = math.prod(shape)
        # Without any entry the other axes must still be ones that numpy can count.
        extent = size or math.prod(axis or 1 for axis in shape)
        small = len(shape) <= MAX_AXES and extent * dtype.itemsize <= MAX_BODY_BYTES
        expect(small, f"at most {MAX_AXES} axes and {MAX_BODY_BYTES} bytes", f"shape {shape} of {name!r}")
        layout.append((name, dtype, shape, offset))
        offset += num_bytes(size, dtype)
        previous = name
    expect(offset == length, f"a body of {offset} bytes, as its tensors need", f"{length} bytes")
    return layout


def num_bytes(size: int, dtype: np.dtype[Any]) -> int:
    """Return the bytes of so many entries as they travel."""
    return -(-size // 2) if dtype == FOUR_BITS else size * dtype.itemsize


def pack_halves(entries: Array) -> Array:
    """Return entries of 4 bits, each in the lower half of a byte, as two in a byte, the first in its lower half."""
    halves = np.zeros(2 * num_bytes(entries.size, FOUR_BITS), np.uint8)
    halves[: entries.size] = entries & 0xF
    packed: Array = halves[::2] | (halves[1::2] << 4)
    return packed


def unpack_halves(packed: Array, size: int, name: str) -> Array:
    """Return the entries that `pack_halves` has packed.

    Raises:
        WireError: if the half that an odd tensor leaves is not zero: one tensor has one encoding.
    """
    halves = np.empty(2 * packed.size, np.uint8)
    halves[::2], halves[1::2] = packed & 0xF, packed >> 4
    expect(not halves[size:].any(), f"zero after the last entry of {name!r}", "another number")
    return halves[:size]


def deflate(body: bytes) -> bytes:
    """Return a body of codes in fewer bytes: few of them are large, so 4 bits of a change hold about 3.5.

    By Huffman's code alone, at 0.1 GB/s: what numbers of a change have in common is their size, and no strings.
    """
    coder = zlib.compressobj(wbits=-zlib.MAX_WBITS, strategy=zlib.Z_HUFFMAN_ONLY)
    return coder.compress(body) + coder.flush()


def inflate(data: memoryview, size: int, role: str) -> memoryview:
    """Return the body of so many bytes that `deflate` has made smaller.

    Raises:
        WireError: if the data are no such body.
    """
    body = inflate_up_to(data, size, role)
    expect(len(body) == size, f"{role} of {size} bytes once inflated, and nothing after it", f"{len(body)} bytes")
    return memoryview(body)


def inflate_up_to(data: bytes | memoryview, limit: int, role: str) -> bytes:
    """Return what a raw DEFLATE stream holds; memory is taken for `limit` bytes at most.

    Raises:
        WireError: if the data are none, hold more, or go on after it.
    """
    coder = zlib.decompressobj(wbits=-zlib.MAX_WBITS)
    try:
        # One byte more than there may be, for else the stream's end would not be read.
        inflated = coder.decompress(data, limit + 1)
    except zlib.error:
        raise WireError(f"{role}: expected a deflated body; got {len(data)} bytes of others") from None
    whole = len(inflated) <= limit and coder.eof and not coder.unused_data
    expect(whole, f"{role} of {limit} bytes once inflated, and nothing after it", f"{len(inflated)} or more, or no end")
    return inflated


def digest(body: bytes | memoryview) -> bytes:
    """Return the SHA-256 of a body, 32 bytes: the name under which it is found."""
    return hashlib.sha256(body).digest()
