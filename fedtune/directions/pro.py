"""Which directions have mattered so far: probabilities of seeds from the sizes of their scalars (FedKSeed-Pro).

Qin et al., ICML 2024, arXiv 2312.06353, section 3.4. The published rule gives a seed that was never drawn the lowest
probability of all, and halves what a first visit says, because each history begins with a zero. `repaired` starts
every history at the mean over all visits instead, and keeps a tenth of the probability uniform.
"""

from __future__ import annotations

import numpy as np

from fedtune.tensors import Array

UNIFORM_SHARE = 0.1
"""Of the repaired rule."""


def paper_probabilities(sizes: Array, visits: Array) -> Array:
    """Return the probabilities of K seeds, float64 (K,): softmax of the min-max scaled means, each over one zero more.

    Args:
        sizes: sum of |scalar| of each seed, int64 (K,). The published clip at 1000 cannot be reached on the wire.
        visits: how often each seed was drawn, int64 (K,).
    """
    h = sizes / (visits + 1)
    span = h.max() - h.min()
    return softmax((h - h.min()) / span if span > 0 else np.zeros(len(h)))


def repaired_probabilities(sizes: Array, visits: Array) -> Array:
    """Return the probabilities of K seeds, float64 (K,); arguments are those of `paper`.

    h_k = (S_k + m) / (n_k + 1), m the mean |scalar| over all visits, v_k = clip((h_k - m) / m, -1, 1) and
    p = 0.9 softmax(v) + 0.1 / K; uniform before the first visit.
    """
    size, seen = len(sizes), int(visits.sum())
    mean = int(sizes.sum()) / seen if seen else 0.0
    if mean == 0.0:
        return np.full(size, 1 / size)
    v = np.clip(((sizes + mean) / (visits + 1) - mean) / mean, -1.0, 1.0)
    return (1 - UNIFORM_SHARE) * softmax(v) + UNIFORM_SHARE / size


def softmax(v: Array) -> Array:
    powers = np.exp(v - v.max())
    return np.asarray(powers / powers.sum(), np.float64)
