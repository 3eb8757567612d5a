"""The number formats in which tensors travel: floats, or codes of 8 and 4 bits that share a scale with their group.

A quantised tensor is two: `<name>` holds signed codes in the tensor's own shape, `<name>.scales` one scale for every
group of `GROUP` neighbours along the longer axis of a factor, rounded up to bfloat16. A number is code * scale.

bfloat16 and not float16: the changes of a round at a small learning rate are below what float16 can scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np

from fedtune.seeds import derive, generator
from fedtune.tensors import DTYPES, Array, Tensors, cast

CODES: Mapping[str, np.dtype[Any]] = {"int8": np.dtype(np.int8), "int4": np.dtype(ml_dtypes.int4)}
"""The formats of codes by the name that recipes use; both are symmetric, so -128 and -8 are no codes."""
FORMATS: Mapping[str, np.dtype[Any]] = {**DTYPES, **CODES}
LARGEST_CODE: Mapping[str, int] = {"int8": 127, "int4": 7}
GROUP = 64
"""Numbers that share a scale; the last group of a row or column holds what is left."""
SCALES = ".scales"
"""Ending of the name of a quantised tensor's scales."""
SCALE_DTYPE = DTYPES["bf16"]

Scale: TypeAlias = Callable[[Array, int], Array]
"""(largest magnitudes of groups, float32; the largest code) -> their scales, float32. Secure sums need scales that are
the same for all clients, so they are a choice of the caller."""


def to_wire(tensors: Tensors, dtype: str, *, key: int | None = None, scale: Scale | None = None) -> Tensors:
    """Return tensors in a wire format: cast, or as codes with scales.

    Args:
        tensors: flat factors, or dense changes.
        dtype: a name in `tensors.DTYPES` or in `CODES`.
        key: codes are rounded at random by it, right on average; None: to the nearest.
        scale: of groups; None: the smallest by which every number of the group has a code.
    """
    if dtype not in CODES:
        return cast(tensors, dtype)
    wire: dict[str, Array] = {}
    for name, array in tensors.items():
        draw = None if key is None else generator(derive(key, "wire.rounding", client=name))
        codes, scales = quantise(lengthwise(name, array), LARGEST_CODE[dtype], draw, scale or smallest_scale)
        wire[name] = lengthwise(name, codes).astype(CODES[dtype])
        wire[name + SCALES] = lengthwise(name, scales)
    return wire


def is_quantised(tensors: Tensors) -> bool:
    """Return whether some of the tensors are codes with scales."""
    return any(name.endswith(SCALES) for name in tensors)


def from_wire(tensors: Tensors) -> Tensors:
    """Return tensors with the quantised ones widened to float32; those in other formats stay as they are."""
    if not is_quantised(tensors):
        return tensors
    plain = {name: array for name, array in tensors.items() if not name.endswith(SCALES)}
    return {
        name: widen(name, array, tensors[name + SCALES]) if name + SCALES in tensors else array
        for name, array in plain.items()
    }


def widen(name: str, codes: Array, scales: Array) -> Array:
    """Return code * scale of every number, float32."""
    rows, wide = lengthwise(name, codes), lengthwise(name, scales).astype(np.float32)
    numbers = np.ascontiguousarray(rows, np.float32) if rows.size else rows.astype(np.float32)
    # A hostile scale times its code may be infinite, which is found where numbers are checked.
    with np.errstate(over="ignore", invalid="ignore"):
        numbers *= np.repeat(wide, GROUP, axis=1)[:, : rows.shape[1]]
    return np.ascontiguousarray(lengthwise(name, numbers))


def scales_shape(name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the shape that a matrix's scales have.

    >>> scales_shape("layer.a", (4, 130)), scales_shape("layer.b", (130, 4))
    ((4, 3), (3, 4))
    """
    rows, columns = shape
    return (-(-rows // GROUP), columns) if name.endswith(".b") else (rows, -(-columns // GROUP))


def lengthwise(name: str, array: Array) -> Array:
    """Return a matrix with its groups along the last axis, or turn it back: b (out, rank) is laid on its side.

    A group then lies within one rank: the columns of b may differ in size by orders of magnitude.
    """
    return array.T if name.endswith(".b") else array


def quantise(rows: Array, largest: int, draw: np.random.Generator | None, scale: Scale) -> tuple[Array, Array]:
    """Return codes (rows, n) as int8 and scales (rows, groups) of a matrix; numbers that are none scale to NaN."""
    count, width = rows.shape
    groups = -(-width // GROUP)
    padded = np.zeros((count, groups * GROUP), np.float32)
    padded[:, :width] = rows
    grouped = padded.reshape(count, groups, GROUP)
    scales = round_up(scale(np.abs(grouped).max(axis=2, initial=0.0), largest))  # (rows, groups)
    wide = scales.astype(np.float32)[:, :, None]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        grouped /= wide
    # A group of zeros, or with a number that is none: codes of zero, and the scale says which.
    bad = ~(np.isfinite(wide) & (wide > 0))
    np.copyto(grouped, 0.0, where=bad)
    if draw is None:
        np.rint(padded, out=padded)
    else:
        padded += draw.random(padded.shape, dtype=np.float32)
        np.floor(padded, out=padded)
    np.clip(padded, -largest, largest, out=padded)
    return padded[:, :width].astype(np.int8), scales


def smallest_scale(largest_magnitudes: Array, largest: int) -> Array:
    """Return the scales by which the largest number of every group has the largest code."""
    scales: Array = largest_magnitudes / np.float32(largest)
    return scales


def round_up(scales: Array) -> Array:
    """Return the next bfloat16 at or above each scale: below it, the largest number would have no code."""
    bits = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    up = (((bits + np.uint32(0xFFFF)) >> np.uint32(16)).astype(np.uint16)).view(SCALE_DTYPE)
    return np.where(np.isfinite(scales), up, scales.astype(SCALE_DTYPE))
