"""Changes too large for factors: a dense matrix with its leading singular triples, which follow it from sum to sum.

The matrix is exact; its leading triples are found by a few products with those of the sum before (subspace iteration,
Halko, Martinsson and Tropp, 2011, algorithm 4.4), never by a full decomposition. What is built on them stays exact
whatever their accuracy, since the rest is the matrix minus them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import numpy as np

from fedtune.lora import lowrank
from fedtune.lora.adapter import Factors
from fedtune.lora.lowrank import LowRank, each_quietly, truncate, weighted_sum
from fedtune.seeds import derive, generator
from fedtune.tensors import Array, Tensors, squared_norm

NARROW = 512
"""Smaller side of a layer up to which a full decomposition costs no more than a round's other work."""
OVERSAMPLING = 8
"""Triples that are followed beside those that are wanted: the wanted ones settle the faster."""
SETTLED = 1e-7
"""Share by which the squared singular values of the followed triples still grow when they count as found."""
PASSES = 12
"""The most products with the matrix and its transpose in one round."""


@dataclass(frozen=True)
class Dense:
    """The change of one linear layer as a matrix, float32."""

    weight: Array
    """(out, in)"""
    lead: LowRank
    """Its leading singular triples."""
    dropped: float = 0.0
    """Nothing: the matrix holds the whole sum."""

    @property
    def rank(self) -> int:
        """The smaller side: what the rank may be."""
        return min(self.shape)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return int(self.weight.shape[0]), int(self.weight.shape[1])

    @property
    def s(self) -> Array:
        """The leading singular values."""
        return self.lead.s

    @property
    def factors(self) -> Factors:
        """The same change as factors of scale 1, one of which is the identity."""
        m, n = self.shape
        if m < n:
            return Factors(a=self.weight, b=np.eye(m, dtype=np.float32))
        return Factors(a=np.eye(n, dtype=np.float32), b=self.weight)

    def components(self, start: int, stop: int) -> Dense | LowRank:
        """Return the change without its `start` leading triples, or of the leading triples start..stop-1 alone."""
        if stop < self.rank:
            return self.lead.components(start, stop)
        if not start:
            return self
        leading = self.lead.components(0, start).factors
        return Dense(self.weight - leading.b @ leading.a, self.lead.components(start, self.lead.rank))


Summed: TypeAlias = LowRank | Dense


def sums(
    before: Mapping[str, Summed],
    parts: Mapping[str, Sequence[tuple[Factors, float]]],
    *,
    max_rank: int | Mapping[str, int] | None,
    lead: int,
    tau: float = 1.0,
) -> Mapping[str, Summed]:
    """Return every module's change plus the weighted sum of its parts, as many modules at a time as there are cores.

    Args:
        before: the changes so far, by module.
        parts: what is added to them, by module.
        max_rank: largest rank that is kept, of all modules or by module; None keeps everything, in the form that is
            cheaper.
        lead: leading triples that are followed where the matrix is kept.
        tau: share of the squared singular values that these triples hold at least.
    """
    bounds = max_rank if isinstance(max_rank, Mapping) else dict.fromkeys(before, max_rank)
    add_parts = partial(add, lead=lead, tau=tau)
    return each_quietly(
        lambda own: add_parts(own[0], own[1], max_rank=own[2]),
        {name: (low, parts[name], bounds[name]) for name, low in before.items()},
    )


def add(
    before: Summed, parts: Sequence[tuple[Factors, float]], *, max_rank: int | None, lead: int, tau: float
) -> Summed:
    """Return one module's change plus the weighted sum of its parts."""
    (m, n), rank = before.shape, sum(factors.rank for factors, _ in parts)
    if max_rank is not None or (isinstance(before, LowRank) and not is_cheaper_dense(m, n, before.rank + rank)):
        return weighted_sum([(before.factors, 1.0), *parts], max_rank)
    if isinstance(before, Dense):
        weight, start = before.weight.copy(), before.lead.vt
    else:
        weight, start = (before.u * before.s) @ before.vt, before.vt[: lead + OVERSAMPLING]
    if rank:
        # In float32: what a round adds is a small part of the sum, which rests in float32 as well.
        x = np.concatenate([(weight_of * f.b.astype(np.float64)).astype(np.float32) for f, weight_of in parts], axis=1)
        weight += x @ np.concatenate([f.a.astype(np.float32) for f, _ in parts])
    return with_lead(weight, start, size=lead, tau=tau)


def is_cheaper_dense(m: int, n: int, rank: int) -> bool:
    """Return whether a layer's change of a rank is kept as a matrix: from half the numbers of the matrix on.

    There the factored sum takes longer than the product that adds to a matrix, and what is sent is about as large.

    >>> is_cheaper_dense(4096, 4096, 1024), is_cheaper_dense(4096, 4096, 1000), is_cheaper_dense(256, 256, 256)
    (True, False, False)
    """
    return min(m, n) > NARROW and 2 * rank * (m + n) >= m * n


def with_lead(weight: Array, start: Array, *, size: int, tau: float) -> Summed:
    """Return a matrix with as many leading triples as are wanted, or as hold the share `tau` of its energy.

    Where half of all triples do not hold it, what is sent is no smaller than the matrix: all are computed.
    """
    energy = squared_norm(weight)
    while True:
        lead = leading(weight, start, size)
        if tau == 1.0 or float(np.sum(np.square(lead.s, dtype=np.float64))) >= tau * energy:
            return Dense(weight, lead)
        if 4 * size > min(weight.shape):
            return Dense(weight, lowrank.whole(weight))
        size, start = 2 * size, lead.vt


def leading(weight: Array, start: Array, size: int) -> LowRank:
    """Return the leading `size` singular triples of a matrix (m, n), found from rows (k, n) that are near them."""
    m, n = weight.shape
    width = min(size + OVERSAMPLING, m, n)
    fresh = generator(derive(0, "dense.leading")).standard_normal((max(0, width - len(start)), n), dtype=np.float32)
    rows, captured = np.concatenate([start[:width], fresh]), 0.0  # (k, n)
    for _ in range(PASSES):
        left = np.linalg.qr(weight @ np.linalg.qr(rows.T)[0])[0]  # (m, k)
        rows = left.T @ weight
        before, captured = captured, squared_norm(rows)
        if captured - before <= SETTLED * captured:
            break
    # Once more in float64: vectors that are orthonormal to float32 alone would drift from round to round.
    left, turn = np.linalg.qr(left.astype(np.float64))
    u, s, vt = np.linalg.svd(turn @ rows.astype(np.float64), full_matrices=False)
    return lowrank.of_triples(left @ u[:, :size], s[:size], vt[:size])


def cut_down(change: Summed, *, tau: float, max_rank: int | None) -> Summed:
    """Return `lowrank.truncate` of a change; a matrix of which everything is wanted is returned as it is."""
    if isinstance(change, LowRank):
        return truncate(change, tau=tau, max_rank=max_rank)
    if tau == 1.0:
        return change if max_rank is None else change.components(0, max_rank)
    captured = np.cumsum(np.square(change.lead.s, dtype=np.float64))
    count = 1 + int(np.searchsorted(captured[:-1], tau * energy(change)))
    return change.lead.components(0, count if max_rank is None else min(count, max_rank))


def energy(change: Summed) -> float:
    """Return the squared Frobenius norm of a change."""
    if isinstance(change, Dense):
        return squared_norm(change.weight)
    return float(np.sum(np.square(change.s, dtype=np.float64)))


def energy_kept(whole: Summed, part: Summed) -> float:
    """Return the squared Frobenius norm of `part` over that of `whole`; 1 if there is nothing to keep."""
    total = energy(whole)
    return energy(part) / total if total else 1.0


def pack(changes: Mapping[str, Summed]) -> Tensors:
    """Return the changes as flat tensors: `lowrank.pack` of triples, and `<module>.w` of matrices."""
    triples = {name: change.lead if isinstance(change, Dense) else change for name, change in changes.items()}
    weights = {f"{name}.w": change.weight for name, change in changes.items() if isinstance(change, Dense)}
    return {**lowrank.pack(triples), **weights}


def unpack(tensors: Tensors) -> Mapping[str, Summed]:
    """Return the changes that `pack` made flat."""
    return {
        name: Dense(tensors[f"{name}.w"], low) if f"{name}.w" in tensors else low
        for name, low in lowrank.unpack(tensors).items()
    }
