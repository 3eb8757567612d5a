"""What a cohort's scalars add to the accumulators, and how accumulators travel: whole, as a change, or as a log.

In every form a client gets the same integers; it checks the digest of what it has put together. A log serves one bank
of one group alone: elsewhere a client would have to know which round drew along which bank.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedtune.errors import WireError
from fedtune.tensors import Array

MAX_SCALAR = 127
"""Bound of a scalar, which is a signed byte; -128 is not allowed, so that both signs reach equally far."""
MAX_WEIGHT = 127
"""Largest averaging weight of a client."""
MAX_SHIFT = 24
"""A scalar of 1 never moves an accumulator by more than 2^24."""
MAX_LOG = 16
"""Rounds that a log may span, and that a client remembers."""
ROUND_HEADER = struct.Struct("<BH")
"""Shift and number of clients."""
UPDATE_HEADER = struct.Struct("<QBH")
"""Sample key, weight and number of scalars."""
FIRST_BANK = struct.Struct("<H")
"""Of a change over several banks: how many of the oldest ones are as they were, and left out."""
INT16 = 2**15

SampleIds = Callable[[int, int], Array]
"""From a sample key and a number of scalars to the ids they belong to."""


@dataclass(frozen=True)
class LoggedUpdate:
    """What one client's update of one round added."""

    key: int
    """Sample key: the ids follow from it."""
    weight: int
    """1 to 127."""
    scalars: Array
    """int8 (steps,)."""


@dataclass(frozen=True)
class LoggedRound:
    """All that one round added, in the order of the clients' names; the names themselves are left out."""

    shift: int
    """A scalar of 1 moved an accumulator by 2^shift, before the mean was taken."""
    clients: Sequence[LoggedUpdate]


def count_scalars(ids: Array, scalars: Array, size: int) -> Array:
    """Return a client's sum of scalars for each of K directions, int64 (K,)."""
    sums = np.zeros(size, np.int64)
    # Not sums[ids] += scalars, which adds a repeated id only once.
    np.add.at(sums, ids, scalars.astype(np.int64))
    return sums


def weighted_sum(parts: Iterable[tuple[Array, int]], size: int) -> tuple[Array, int]:
    """Return (sum of w_i a_i, sum of w_i), exactly: a_i is int64 (K,), w_i a whole number from 1 to 127."""
    sums, total = np.zeros(size, np.int64), 0
    for client_sums, weight in parts:
        sums += weight * client_sums
        total += weight
    return sums, total


def increments(sums: Array, total: int, shift: int) -> Array:
    """Return 2^shift * sums / total rounded to the nearest integer, a tie to the even one, int64 (K,).

    Integers all the way: no order of arrival and no machine can change a bit. The client's own step,
    `A[k] += q * 2^shift`, is the case of one client. A `total` of zero means no client; then nothing is added.
    """
    if total == 0:
        return np.zeros(len(sums), np.int64)
    twice = (sums << (shift + 1)) + total
    # floor((2 a + b) / 2b) rounds a / b to the nearest with ties up; an odd result without a rest was such a tie.
    quotient, rest = np.divmod(twice, 2 * total)
    return np.asarray(quotient - ((rest == 0) & (quotient & 1 == 1)), np.int64)


def encode_whole(accumulators: Array) -> bytes:
    """Return all integers, in 16 bits where all fit, else in 32."""
    return bytes(accumulators.astype("<i2" if fits_16_bits(accumulators) else "<i4").tobytes())


def decode_whole(data: bytes, size: int) -> Array:
    """Return the accumulators that were encoded, int32 (size,).

    Raises:
        WireError: if the length is that of neither form.
    """
    if len(data) not in (2 * size, 4 * size):
        raise WireError(f"accumulators: expected {2 * size} or {4 * size} bytes for {size} seeds; got {len(data)}")
    return np.frombuffer(data, "<i2" if len(data) == 2 * size else "<i4").astype(np.int32)


def encode_changed(accumulators: Array, known: Array, *, banks: int = 1) -> bytes:
    """Return a bit per number and the new value of each that differs from the known one, in 16 bits where all fit.

    Args:
        accumulators: of all banks, oldest first.
        known: those that the client knows; of fewer banks, where later ones were new since, which begin with zeros.
        banks: how many the accumulators are of. Of several, the oldest that are as they were take no bits.
    """
    differs = accumulators != pad_zeros(known, len(accumulators))
    if banks == 1:
        return np.packbits(differs, bitorder="little").tobytes() + encode_whole(accumulators[differs])
    changed = differs.reshape(banks, -1).any(axis=1)
    same = int(np.argmax(changed)) if changed.any() else banks
    start = same * (len(accumulators) // banks)
    return FIRST_BANK.pack(same) + encode_changed(accumulators[start:], pad_zeros(known, len(accumulators))[start:])


def decode_changed(data: bytes, known: Array, *, banks: int = 1) -> Array:
    """Return the accumulators, int32 (size,), given as many that the client knows, zeros for those of new banks.

    Raises:
        WireError: if the length does not fit the bits.
    """
    accumulators = np.array(known, np.int32)
    start = 0
    if banks > 1:
        same = FIRST_BANK.unpack_from(data)[0] if len(data) >= FIRST_BANK.size else banks + 1
        if same > banks:
            raise WireError(f"accumulators: expected at most {banks} banks as they were; got {bytes(data[:2])!r}")
        data, start = data[FIRST_BANK.size :], same * (len(known) // banks)
    size = len(known) - start
    front = -(-size // 8)
    differs = np.unpackbits(np.frombuffer(data[:front], np.uint8), bitorder="little")
    count, rest = int(differs.sum()), len(data) - front
    if len(data) < front or differs[size:].any() or rest not in (2 * count, 4 * count):
        raise WireError(
            f"accumulators: expected {front} bytes of bits and {count} values of 2 or 4; got {len(data)} bytes"
        )
    if count:
        values = np.frombuffer(data, "<i2" if rest == 2 * count else "<i4", offset=front)
        accumulators[start:][differs[:size] == 1] = values
    return accumulators


def pad_zeros(accumulators: Array, size: int) -> Array:
    """Return accumulators with zeros for those of banks that are new since."""
    return np.concatenate([accumulators, np.zeros(size - len(accumulators), accumulators.dtype)])


def encode_log(rounds: Sequence[LoggedRound]) -> bytes:
    """Return rounds one after the other: shift, number of clients, then key, weight, count and scalars of each."""
    parts = []
    for entry in rounds:
        parts.append(ROUND_HEADER.pack(entry.shift, len(entry.clients)))
        for update in entry.clients:
            header = UPDATE_HEADER.pack(update.key, update.weight, len(update.scalars))
            parts += [header, update.scalars.astype(np.int8).tobytes()]
    return b"".join(parts)


def decode_log(data: bytes) -> Sequence[LoggedRound]:
    """Return the rounds that were encoded.

    Raises:
        WireError: if the bytes do not end with an entry, or a number is out of range.
    """
    rounds, place = [], 0
    try:
        while place < len(data):
            shift, number = ROUND_HEADER.unpack_from(data, place)
            place += ROUND_HEADER.size
            clients = []
            for _ in range(number):
                key, weight, steps = UPDATE_HEADER.unpack_from(data, place)
                place += UPDATE_HEADER.size
                scalars = np.frombuffer(data, np.int8, count=steps, offset=place)
                place += steps
                clients.append(LoggedUpdate(key, weight, scalars))
            rounds.append(LoggedRound(shift, clients))
    except (struct.error, ValueError):  # the latter from frombuffer, where scalars are missing
        raise WireError(f"log of rounds: expected whole entries; got {len(data)} bytes that end within one") from None
    weights = [update.weight for entry in rounds for update in entry.clients]
    if any(entry.shift > MAX_SHIFT for entry in rounds) or not all(1 <= weight <= MAX_WEIGHT for weight in weights):
        raise WireError(f"log: expected shifts of at most {MAX_SHIFT} and weights from 1 to {MAX_WEIGHT}; got others")
    return rounds


def replay_log(accumulators: Array, rounds: Sequence[LoggedRound], sample_ids: SampleIds) -> Array:
    """Return the accumulators after some more rounds, int64 (K,): the very sums that the server made."""
    size, sums = len(accumulators), accumulators.astype(np.int64)
    for entry in rounds:
        # A generator, so that one client's K sums are in memory at a time: a hostile log may have thousands of clients.
        parts = (
            (count_scalars(sample_ids(update.key, len(update.scalars)), update.scalars, size), update.weight)
            for update in entry.clients
        )
        sums = sums + increments(*weighted_sum(parts, size), entry.shift)
    return sums


def shortest_form(forms: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Return (name, bytes) of the form that takes the fewest bytes; of equals the first by name."""
    return min(sorted(forms.items()), key=lambda form: len(form[1]))


def fits_16_bits(values: Array) -> bool:
    return bool((values >= -INT16).all() and (values < INT16).all())
