"""Weights of a base in one safetensors file that ONNX graphs refer to by offset: float32, or 8 bits for matrices."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from fedtune.tensors import Array

ALIGNMENT = 64
"""Bytes: of the first tensor, so that vector instructions read whole lines of the cache."""
SCALE = ".scale"
"""Ending of the tensor with a matrix's scales, one for each of its outputs, where it is held in 8 bits."""
LEVELS = 127
"""Largest integer of 8 bits that is used: the same on both sides of zero."""


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in the file of weights."""

    kind: Literal["F32", "I8"]
    shape: tuple[int, ...]
    begin: int
    """Byte of the file."""
    size: int
    """In bytes."""


def write_weights(
    path: Path, shapes: Mapping[str, Sequence[int]], read: Callable[[str], Array], *, rounded: Mapping[str, int]
) -> Mapping[str, Stored]:
    """Write tensors to a new file, one at a time, and return where each of them lies.

    Args:
        path: of the file.
        shapes: of the tensors, by name.
        read: gives a tensor in float32.
        rounded: matrices to hold in 8 bits, with the axis of their outputs, for which each has a scale.
    """
    parts: list[tuple[str, Literal["F32", "I8"], tuple[int, ...]]] = []
    for name, shape in shapes.items():
        if name in rounded:
            parts.append((name + SCALE, "F32", (shape[rounded[name]],)))
        else:
            parts.append((name, "F32", tuple(shape)))
    # Behind those of four bytes, which else could begin between two.
    parts += [(name, "I8", tuple(shapes[name])) for name in shapes if name in rounded]
    header, table = layout(parts)
    with path.open("xb") as file:
        file.write(header)
        for name in shapes:
            if name in rounded:
                codes, scale = round_to_8_bits(read(name), axis=rounded[name])
                put(file, table[name], codes)
                put(file, table[name + SCALE], scale)
            else:
                put(file, table[name], read(name))
    return table


def layout(
    parts: Sequence[tuple[str, Literal["F32", "I8"], tuple[int, ...]]],
) -> tuple[bytes, Mapping[str, Stored]]:
    """Return the header of a safetensors file of such tensors in this order, and where each of them lies."""
    entries, places, begin = dict[str, Any](), dict[str, tuple[int, int]](), 0
    for name, kind, shape in parts:
        end = begin + prod(shape) * (4 if kind == "F32" else 1)
        entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
        places[name], begin = (begin, end), end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    first = 8 + len(text)
    table = {
        name: Stored(kind, shape, first + places[name][0], places[name][1] - places[name][0])
        for name, kind, shape in parts
    }
    return len(text).to_bytes(8, "little") + text, table


def put(file: BinaryIO, place: Stored, tensor: Array) -> None:
    """Write a tensor to its place."""
    assert tensor.shape == place.shape, place
    file.seek(place.begin)
    file.write(np.ascontiguousarray(tensor).data)


def round_to_8_bits(matrix: Array, *, axis: int) -> tuple[Array, Array]:
    """Return codes (int8, as the matrix) and scales (float32, one per output), whose product is nearest to a matrix.

    Args:
        matrix: float32.
        axis: of the outputs.
    """
    largest = np.abs(matrix).max(axis=1 - axis, keepdims=True)
    # A row of zeros has no largest number to divide by; below the normal numbers, quotients could leave 8 bits.
    scale = np.maximum(largest / np.float32(LEVELS), np.finfo(np.float32).tiny)
    codes = np.rint(matrix / scale).astype(np.int8)
    return codes, scale.reshape(-1)


def names_of(table: Mapping[str, Stored]) -> AbstractSet[str]:
    """Return the tensors of a base that a file holds, scales left out."""
    return {name for name in table if not name.endswith(SCALE)}
