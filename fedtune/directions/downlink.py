"""How accumulators travel to a client: whole, as what changed, or as the log of the rounds it has missed.

Every form stands for the same K integers; the client checks the digest of what it has put together.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.directions.sums import MAX_SHIFT, MAX_WEIGHT, count_scalars, increments, weighted_sum
from fedtune.errors import WireError
from fedtune.tensors import Array

MAX_LOG = 16
"""Rounds that a log may span, and a client keeps."""
FRONT = struct.Struct("<BH")
ONE = struct.Struct("<QBH")
INT16 = 2**15

Ids = Callable[[int, int], Array]
"""From a sample key and a number of scalars to the ids they belong to."""


@dataclass(frozen=True)
class Logged:
    """What one client's update of one round added."""

    key: int
    """Sample key: the ids follow from it."""
    weight: int
    """1 to 127."""
    scalars: Array
    """int8 (steps,)."""


@dataclass(frozen=True)
class LoggedRound:
    """All that one round added, in the order of the clients' names, which do not stand here."""

    shift: int
    """A scalar of one moved an accumulator by 2^shift, before the mean was taken."""
    clients: Sequence[Logged]


def encode_whole(accumulators: Array) -> bytes:
    """Return all K integers, in 16 bits where all fit."""
    return bytes(accumulators.astype("<i2" if short(accumulators) else "<i4").tobytes())


def decode_whole(data: bytes, size: int) -> Array:
    """Return what was encoded, int32 (K,).

    Raises:
        WireError: if the length is that of neither form.
    """
    if len(data) not in (2 * size, 4 * size):
        raise WireError(f"accumulators: expected {2 * size} or {4 * size} bytes for {size} seeds; got {len(data)}")
    return np.frombuffer(data, "<i2" if len(data) == 2 * size else "<i4").astype(np.int32)


def encode_changed(accumulators: Array, known: Array) -> bytes:
    """Return a bit per seed and the new value of each that differs from the known one, in 16 bits where all fit."""
    differs = accumulators != known
    return np.packbits(differs, bitorder="little").tobytes() + encode_whole(accumulators[differs])


def decode_changed(data: bytes, known: Array) -> Array:
    """Return the accumulators, int32 (K,), given what the client knows.

    Raises:
        WireError: if the length does not fit the bits.
    """
    size, front = len(known), -(-len(known) // 8)
    differs = np.unpackbits(np.frombuffer(data[:front], np.uint8), bitorder="little")
    count, rest = int(differs.sum()), len(data) - front
    if len(data) < front or differs[size:].any() or rest not in (2 * count, 4 * count):
        raise WireError(
            f"accumulators: expected {front} bytes of bits and {count} values of 2 or 4; got {len(data)} bytes"
        )
    accumulators = np.array(known, np.int32)
    if count:
        accumulators[differs[:size] == 1] = np.frombuffer(data, "<i2" if rest == 2 * count else "<i4", offset=front)
    return accumulators


def encode_log(rounds: Sequence[LoggedRound]) -> bytes:
    """Return rounds one after the other: shift, number of clients, and key, weight, count and scalars of each."""
    parts = []
    for each in rounds:
        parts.append(FRONT.pack(each.shift, len(each.clients)))
        for one in each.clients:
            parts += [ONE.pack(one.key, one.weight, len(one.scalars)), one.scalars.astype(np.int8).tobytes()]
    return b"".join(parts)


def decode_log(data: bytes) -> Sequence[LoggedRound]:
    """Return the rounds that were encoded.

    Raises:
        WireError: if the bytes are no log to the last one.
    """
    rounds, place = [], 0
    try:
        while place < len(data):
            shift, number = FRONT.unpack_from(data, place)
            place += FRONT.size
            clients = []
            for _ in range(number):
                key, weight, steps = ONE.unpack_from(data, place)
                place += ONE.size
                scalars = np.frombuffer(data, np.int8, count=steps, offset=place)
                place += steps
                clients.append(Logged(key, weight, scalars))
            rounds.append(LoggedRound(shift, clients))
    except (struct.error, ValueError):
        raise WireError(f"log of rounds: expected whole entries; got {len(data)} bytes that end within one") from None
    if any(each.shift > MAX_SHIFT or any(not 1 <= one.weight <= MAX_WEIGHT for one in each.clients) for each in rounds):
        raise WireError(f"log: expected shifts of at most {MAX_SHIFT} and weights from 1 to {MAX_WEIGHT}; got others")
    return rounds


def replay_log(accumulators: Array, rounds: Sequence[LoggedRound], ids: Ids) -> Array:
    """Return the accumulators after some more rounds, int64 (K,): the very sums that the server made."""
    size, sums = len(accumulators), accumulators.astype(np.int64)
    for each in rounds:
        # One after the other: a log has thousands of clients where its sender wants it to.
        parts = ((count_scalars(ids(one.key, len(one.scalars)), one.scalars, size), one.weight) for one in each.clients)
        sums = sums + increments(*weighted_sum(parts, size), each.shift)
    return sums


def smallest(forms: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Return the form that takes the fewest bytes; of equals the first by name."""
    return min(sorted(forms.items()), key=lambda form: len(form[1]))


def short(values: Array) -> bool:
    return bool((values >= -INT16).all() and (values < INT16).all())
