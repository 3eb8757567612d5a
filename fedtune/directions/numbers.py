"""The numbers of a client that descends as bytes: signed integers of 8, 4 or 2 bits, and what they add."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedtune.directions.space import MAX_ACCUMULATORS
from fedtune.errors import WireError
from fedtune.tensors import Array

LARGEST_NUMBER: Mapping[int, int] = {8: 127, 4: 7, 2: 1}
"""By bits, the bound of a number's size: one less than the bits hold on one side, so that both signs reach equally far.
"""
MAX_NUMBERS = MAX_ACCUMULATORS
"""Of one update: there are no more accumulators."""


def pack(numbers: Array, bits: int) -> bytes:
    """Return numbers in two's complement of so many bits, the first of a byte in its lowest bits; zero bits fill up.

    >>> pack(np.array([1, -1, 7], np.int8), 4).hex()
    'f107'
    """
    per_byte = 8 // bits
    codes = np.zeros(-(-len(numbers) // per_byte) * per_byte, np.uint8)
    codes[: len(numbers)] = numbers.astype(np.int8).view(np.uint8) & (2**bits - 1)
    shifts = np.arange(per_byte, dtype=np.uint8) * np.uint8(bits)
    return bytes(np.bitwise_or.reduce(codes.reshape(-1, per_byte) << shifts, axis=1).tobytes())


def unpack(data: bytes, count: int, bits: int) -> Array:
    """Return so many numbers that were packed, int8 (count,), read-only.

    Raises:
        WireError: if bits or length are none that `pack` writes, or the last byte holds more than its numbers.
    """
    if bits not in LARGEST_NUMBER:
        raise WireError(f"numbers: expected {', '.join(map(str, LARGEST_NUMBER))} bits; got {bits}")
    # Before memory is taken: a few bytes must not name a large array.
    if count > MAX_NUMBERS or len(data) != -(-count * bits // 8):
        raise WireError(
            f"numbers: expected {-(-count * bits // 8)} bytes for {count} of {bits} bits, at most {MAX_NUMBERS}; "
            f"got {len(data)}"
        )
    if bits == 8:
        return np.frombuffer(data, np.int8)
    shifts = np.arange(8 // bits, dtype=np.uint8) * np.uint8(bits)
    codes = (np.frombuffer(data, np.uint8)[:, None] >> shifts & np.uint8(2**bits - 1)).ravel()
    if codes[count:].any():
        raise WireError("numbers: expected zero bits after the last one; got others")
    # Up to the sign bit of a byte and back: an arithmetic shift repeats the sign.
    signed = (codes[:count] << np.uint8(8 - bits)).view(np.int8) >> np.int8(8 - bits)
    signed.flags.writeable = False
    return np.asarray(signed, np.int8)


def is_shortest(numbers: Array, shift: int, bits: int) -> bool:
    """Return whether a shift is the smallest that keeps such numbers within their bits: of a change there is one form.

    A change whose largest entry would also fit one shift less has numbers of at most half the bound.
    """
    largest = int(np.abs(numbers.astype(np.int16)).max(initial=0))
    return shift == 0 or largest > LARGEST_NUMBER[bits] // 2
