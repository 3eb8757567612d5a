"""Which directions a client measures: seed ids derived from a key that both ends know, and how likely each id is."""

from __future__ import annotations

import numpy as np

from fedtune.directions.philox import Purpose, words
from fedtune.errors import ConfigError, Fault
from fedtune.tensors import Array

UNIFORM_SHARE = 0.1
"""Share of the probability that `repaired_probabilities` spreads evenly: every seed is visited again some day."""

SHARED = 16
"""Directions that all clients of a run measure, where they are asked for slopes and curvatures."""


def sample_ids(key: int, count: int, size: int, *, sampling: str, levels: bytes = b"") -> Array:
    """Return the ids of a client's scalars, int32 (count,), by the recipe's `sampling`: uniform, distinct or pro.

    The ids follow from the key alone, so that they never travel. `levels` are the bytes of K levels, for `pro`.
    """
    if sampling == "distinct":
        return sample_distinct(key, count, size)
    if sampling == "pro":
        return sample_weighted(key, count, np.frombuffer(levels, np.uint8))
    return sample_uniform(key, count, size)


def sample_uniform(key: int, count: int, size: int) -> Array:
    """Return `count` ids below K, drawn with replacement, int32; `size` is K, a power of two."""
    return np.asarray(uniform_words(key, Purpose.IDS, count) & np.uint64(size - 1), np.int32)


def sample_distinct(key: int, count: int, size: int) -> Array:
    """Return `count` different ids below K, int32: the first places of a Fisher-Yates shuffle.

    Raises:
        ConfigError: if more ids are asked for than there are.
    """
    if count > size:
        raise ConfigError(Fault("steps", f"at most seeds ({size}) with distinct ids", str(count), "take fewer steps"))
    ids = list(range(size))
    for n, word in enumerate(uniform_words(key, Purpose.DISTINCT_IDS, count).tolist()):
        # The high half of a product in place of a remainder: integers alone, and no bias worth a second draw.
        m = n + (word * (size - n) >> 32)
        ids[n], ids[m] = ids[m], ids[n]
    return np.array(ids[:count], np.int32)


def sample_weighted(key: int, count: int, levels: Array) -> Array:
    """Return `count` ids drawn with replacement in proportion to K integer levels (uint8, each at least 1), int32."""
    # Integers to the end: a sum of float probabilities would differ between machines in its last bit.
    ends = np.cumsum(levels, dtype=np.uint64)
    drawn = (uniform_words(key, Purpose.IDS, count) * ends[-1]) >> np.uint64(32)
    return np.asarray(np.searchsorted(ends, drawn, side="right"), np.int32)


def quantise_levels(probabilities: Array) -> Array:
    """Return probabilities as the levels that travel: uint8 of 1 to 255, the likeliest id at 255."""
    p = np.asarray(probabilities, np.float64)
    return np.asarray(np.maximum(1, np.rint(255 * p / p.max())), np.uint8)


def uniform_words(key: int, purpose: Purpose, count: int) -> Array:
    """Return the first `count` random words of a key's stream, below 2^32, uint64 (count,)."""
    return words(key, purpose, calls=-(-count // 4))[0, :count].astype(np.uint64)


def paper_probabilities(sizes: Array, visits: Array) -> Array:
    """Return the probabilities of K seeds by the published rule of FedKSeed-Pro, float64 (K,).

    A softmax of min-max scaled means, each over one zero more (Qin et al., ICML 2024, arXiv 2312.06353, section 3.4).
    It gives a seed that was never drawn the lowest probability of all, and halves the effect of a first visit, because
    each history begins with a zero; see `repaired_probabilities`.

    Args:
        sizes: sum of |scalar| of each seed, int64 (K,). The published clip at 1000 cannot be reached on the wire.
        visits: how often each seed was drawn, int64 (K,).
    """
    h = sizes / (visits + 1)
    span = h.max() - h.min()
    return softmax((h - h.min()) / span if span > 0 else np.zeros(len(h)))


def repaired_probabilities(sizes: Array, visits: Array) -> Array:
    """Return the probabilities of K seeds by our rule, float64 (K,); arguments are those of `paper_probabilities`.

    Every history starts at the mean over all visits, and a tenth of the probability stays uniform:
    h_k = (S_k + m) / (n_k + 1), m the mean |scalar| over all visits, v_k = clip((h_k - m) / m, -1, 1) and
    p = 0.9 softmax(v) + 0.1 / K; uniform before the first visit.
    """
    size, total_visits = len(sizes), int(visits.sum())
    mean = int(sizes.sum()) / total_visits if total_visits else 0.0
    if mean == 0.0:
        return np.full(size, 1 / size)
    v = np.clip(((sizes + mean) / (visits + 1) - mean) / mean, -1.0, 1.0)
    return (1 - UNIFORM_SHARE) * softmax(v) + UNIFORM_SHARE / size


def softmax(v: Array) -> Array:
    powers = np.exp(v - v.max())
    return np.asarray(powers / powers.sum(), np.float64)
