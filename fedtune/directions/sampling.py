"""Which directions a client measures: seed ids derived from a key that both ends know, so that ids never travel."""

from __future__ import annotations

import numpy as np

from fedtune.directions.philox import Purpose, words
from fedtune.errors import ConfigError, Fault
from fedtune.tensors import Array


def sample_ids(key: int, count: int, size: int, *, sampling: str, levels: bytes = b"") -> Array:
    """Return the ids of a client's scalars, int32 (count,), as `uniform`, `distinct` or `weighted` (for `pro`) does."""
    if sampling == "distinct":
        return sample_distinct(key, count, size)
    if sampling == "pro":
        return sample_weighted(key, count, np.frombuffer(levels, np.uint8))
    return sample_uniform(key, count, size)


def sample_uniform(key: int, count: int, size: int) -> Array:
    """Return `count` ids below K, drawn with replacement, int32; `size` is K, a power of two."""
    return np.asarray(stream(key, Purpose.IDS, count) & np.uint64(size - 1), np.int32)


def sample_distinct(key: int, count: int, size: int) -> Array:
    """Return `count` different ids below K, int32: the first places of a Fisher-Yates shuffle.

    Raises:
        ConfigError: if more are asked for than there are.
    """
    if count > size:
        raise ConfigError(Fault("steps", f"at most seeds ({size}) with distinct ids", str(count), "take fewer steps"))
    order = list(range(size))
    for n, word in enumerate(stream(key, Purpose.DISTINCT_IDS, count).tolist()):
        m = n + (word * (size - n) >> 32)
        order[n], order[m] = order[m], order[n]
    return np.array(order[:count], np.int32)


def sample_weighted(key: int, count: int, levels: Array) -> Array:
    """Return `count` ids drawn with replacement in proportion to K integer levels (uint8, each at least 1), int32."""
    ends = np.cumsum(levels, dtype=np.uint64)
    drawn = (stream(key, Purpose.IDS, count) * ends[-1]) >> np.uint64(32)
    return np.asarray(np.searchsorted(ends, drawn, side="right"), np.int32)


def levels(probabilities: Array) -> Array:
    """Return probabilities as the levels that travel: uint8 of 1 to 255, the likeliest id at 255."""
    p = np.asarray(probabilities, np.float64)
    return np.asarray(np.maximum(1, np.rint(255 * p / p.max())), np.uint8)


def stream(key: int, purpose: Purpose, count: int) -> Array:
    """Return the first words of a key's stream, as uint64."""
    return words(key, purpose, calls=-(-count // 4))[0, :count].astype(np.uint64)
