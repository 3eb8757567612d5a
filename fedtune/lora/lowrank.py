"""Sums of low-rank changes as one singular value decomposition, without forming the dense matrix; exact truncation."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from threadpoolctl import threadpool_limits

from fedtune.errors import ShapeError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.seeds import derive, generator
from fedtune.tensors import Array, Tensors

DROP = 1e-6
"""Singular values below this share of the largest one are dropped: float32 factors carry no more."""
ROUNDING = 1e-13
"""Where terms cancel, singular values below this share of the terms' summed norms are float64's rounding: zero."""
TIE = 1e-7
"""Singular values closer than this share are equal: both stay, or both go."""


@dataclass(frozen=True)
class LowRank:
    """The change u @ diag(s) @ vt of one linear layer: orthonormal u and vt, s falling and positive; float32."""

    u: Array
    """(out, rank)"""
    s: Array
    """(rank,)"""
    vt: Array
    """(rank, in)"""

    def __post_init__(self) -> None:
        if not (self.u.ndim == self.vt.ndim == 2 and self.u.shape[1:] == self.s.shape == self.vt.shape[:1]):
            raise ShapeError(
                f"expected u (out, rank), s (rank,), vt (rank, in); got {self.u.shape}, {self.s.shape}, {self.vt.shape}"
            )

    @property
    def rank(self) -> int:
        return int(self.s.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return int(self.u.shape[0]), int(self.vt.shape[1])

    @property
    def factors(self) -> Factors:
        """The same change as LoRA factors of scale 1: b = u diag(s), a = vt."""
        return Factors(a=self.vt, b=self.u * self.s)

    def components(self, start: int, stop: int) -> LowRank:
        """Return the change of the singular triples start..stop-1 alone."""
        return LowRank(u=self.u[:, start:stop], s=self.s[start:stop], vt=self.vt[start:stop])


Triple: TypeAlias = tuple[Array, Array, Array]  # u (m, p), s (p,), vt (p, n) in float64, s falling


def zero(out_features: int, in_features: int) -> LowRank:
    """Return the change of nothing: rank 0."""
    return LowRank(
        u=np.zeros((out_features, 0), np.float32), s=np.zeros(0, np.float32), vt=np.zeros((0, in_features), np.float32)
    )


def compress(changes: Adapter) -> Mapping[str, LowRank]:
    """Return the singular value decomposition of every module's b @ a, exact to float32."""
    return weighted_sums({name: [(factors, 1.0)] for name, factors in changes.items()})


def weighted_sum(parts: Sequence[tuple[Factors, float]]) -> LowRank:
    """Return the sum of weight * b @ a over the parts (at least one), exact to float32.

    Computed in float64 whatever the parts' format, and in the given order. Working memory is O(R(out + in)), R being
    the sum of the ranks; from R = min(out, in) on the dense sum is smaller, and is formed part by part.

    Raises:
        ShapeError: if two parts disagree on the layer's out or in size.
    """
    shapes = {factors.shape for factors, _ in parts}
    if len(shapes) != 1:
        raise ShapeError(f"expected one (out, in) for all parts; got {sorted(shapes)}")
    (m, n), rank = shapes.pop(), sum(factors.rank for factors, _ in parts)
    wide = ((weight * f.b.astype(np.float64), f.a.astype(np.float64)) for f, weight in parts)  # (m, r_k), (r_k, n)
    if rank < min(m, n):
        xs, ys = zip(*wide, strict=True)
        u, s, vt = _svd_of_product(np.concatenate(xs, axis=1), np.concatenate(ys))  # (m, R), (R, n)
    else:
        dense, size = np.zeros((m, n)), 0.0
        for x, y in wide:
            dense += x @ y
            size += float(np.sum(_sizes(x, y)))
        u, s, vt = _drop(*np.linalg.svd(dense, full_matrices=False), floor=ROUNDING * size)
    u, s, vt = _drop(u, s, vt, floor=DROP * float(s.max(initial=0.0)))
    # The sign of a singular pair is free; fixing it makes equal changes equal factors.
    sign = np.sign(u[np.abs(u).argmax(axis=0), np.arange(s.size)])
    return LowRank(u=(u * sign).astype(np.float32), s=s.astype(np.float32), vt=(vt.T * sign).T.astype(np.float32))


def weighted_sums(parts: Mapping[str, Sequence[tuple[Factors, float]]]) -> Mapping[str, LowRank]:
    """Return `weighted_sum` of every module, as many modules at a time as there are cores.

    BLAS is held to one thread meanwhile: its threads gain nothing on matrices of R x R, stall when another process
    wants a core, and would let the core count decide the last bits.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(min(cores, max(1, len(parts)))) as pool:
        return dict(zip(parts, pool.map(_sum_quietly, parts.values()), strict=True))


def _sum_quietly(parts: Sequence[tuple[Factors, float]]) -> LowRank:
    # A thread does not inherit its caller's settings. What overflows is found in the result, where it is refused.
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        return weighted_sum(parts)


def truncate(low: LowRank, *, tau: float, max_rank: int | None) -> LowRank:
    """Return the fewest leading triples that keep the share `tau` of the squared singular values.

    Triples that tie with the last one kept stay too; `max_rank` is a hard limit, none is no limit. This is the best
    approximation of its rank, off by the root of the dropped squares (Eckart-Young). FLoRIST, arXiv 2506.09199.
    """
    energy = np.cumsum(np.square(low.s, dtype=np.float64))  # (rank,)
    if not low.rank:
        return low
    count = 1 + int(np.searchsorted(energy[:-1], tau * energy[-1]))
    count = int(np.count_nonzero(low.s >= low.s[count - 1] * (1 - TIE)))
    return low.components(0, count if max_rank is None else min(count, max_rank))


def energy_kept(whole: LowRank, part: LowRank) -> float:
    """Return the squared singular values of `part` over those of `whole`; 1 if there is nothing to keep."""
    total = float(np.sum(np.square(whole.s, dtype=np.float64)))
    return float(np.sum(np.square(part.s, dtype=np.float64))) / total if total else 1.0


def adapter(changes: Mapping[str, LowRank]) -> Adapter:
    """Return the changes as an adapter of scale 1; a module of rank 0 is left out."""
    return {name: low.factors for name, low in changes.items() if low.rank}


def smallest(changes: Adapter) -> Tensors:
    """Return the changes as flat tensors: factors `.a` and `.b`, or the dense `.w` where that has fewer numbers."""
    flat: dict[str, Array] = {}
    for name, factors in changes.items():
        m, n = factors.shape
        if factors.rank * (m + n) >= m * n:
            flat[f"{name}.w"] = factors.b @ factors.a  # (m, n)
        else:
            flat |= {f"{name}.a": factors.a, f"{name}.b": factors.b}
    return flat


def pack(changes: Mapping[str, LowRank]) -> Tensors:
    """Return the changes as flat tensors `<module>.u`, `<module>.s` and `<module>.vt`, as states keep them."""
    return {f"{name}.{part}": getattr(low, part) for name, low in changes.items() for part in ("u", "s", "vt")}


def unpack(tensors: Tensors) -> Mapping[str, LowRank]:
    """Return the changes that `pack` made flat."""
    names = [key.removesuffix(".s") for key in tensors if key.endswith(".s")]
    return {name: LowRank(*(tensors[f"{name}.{part}"] for part in ("u", "s", "vt"))) for name in names}


def _sizes(x: Array, y: Array) -> Array:
    """Return |x_j| |y_j|, (R,), the norms of the rank-one terms of x @ y."""
    sizes: Array = np.linalg.norm(x, axis=0) * np.linalg.norm(y, axis=1)
    return sizes


def _svd_of_product(x: Array, y: Array) -> Triple:
    """Return the singular value decomposition of x @ y, x (m, R) and y (R, n), R < min(m, n)."""
    sizes = _sizes(x, y)
    # A term of zero would be divided by its own norm below.
    if not np.all(sizes):
        x, y = x[:, sizes > 0], y[sizes > 0]
    if not y.size:
        return x, np.zeros(0), y
    return _drop(*(_by_gram(x, y) or _by_qr(x, y)), floor=ROUNDING * float(sizes.sum()))


def _by_gram(x: Array, y: Array) -> Triple | None:
    """Return the decomposition from R x R matrices, or None where squaring x and y has cost too many digits.

    With x' x = V_x L_x V_x' and y y' = V_y L_y V_y', the core sqrt(L_x) V_x' V_y sqrt(L_y) has x @ y's singular values.
    """
    gram_x, gram_y = x.T @ x, y @ y.T  # (R, R)
    # x_j and y_j only count by their product: at equal norms the Gram matrices are as well conditioned as they can be.
    balance = (np.diag(gram_y) / np.diag(gram_x)) ** 0.25  # (R,)
    left, right = _root(gram_x * np.outer(balance, balance)), _root(gram_y / np.outer(balance, balance))
    if left is None or right is None:
        return None
    (root_x, v_x), (root_y, v_y) = left, right
    core_u, s, core_vt = np.linalg.svd((v_x * root_x).T @ (v_y * root_y), full_matrices=False)
    u = x @ ((balance[:, None] * v_x / root_x) @ core_u)  # (m, p)
    vt = (core_vt @ (v_y / root_y).T / balance) @ y  # (p, n)
    # One random vector shows the error of the whole product at the cost of three products with a vector.
    probe = generator(derive(0, "lowrank.probe")).standard_normal(y.shape[1])
    exact = x @ (y @ probe)
    error = np.linalg.norm(exact - u @ (s * (vt @ probe)))
    return (u, s, vt) if error <= DROP * np.linalg.norm(exact) else None


def _root(gram: Array) -> tuple[Array, Array] | None:
    """Return roots (p,) and vectors (R, p) of the Gram matrix's nonzero eigenvalues.

    An eigenvalue is known to about 1e-16 of the largest: below 1e-14 it is zero, and one between that and 1e-9 would
    leave the singular vectors less orthonormal than 1e-6; then the answer is None.
    """
    values, vectors = np.linalg.eigh(gram)
    nonzero = values > 1e-14 * values[-1]
    if np.any(values[nonzero] < 1e-9 * values[-1]):
        return None
    return np.sqrt(values[nonzero]), vectors[:, nonzero]


def _by_qr(x: Array, y: Array) -> Triple:
    """Return the decomposition by way of two orthonormal bases: about eight times slower than Gram, always accurate."""
    q_x, r_x = np.linalg.qr(x)
    q_y, r_y = np.linalg.qr(y.T)
    core_u, s, core_vt = np.linalg.svd(r_x @ r_y.T)
    return q_x @ core_u, s, core_vt @ q_y.T


def _drop(u: Array, s: Array, vt: Array, *, floor: float) -> Triple:
    """Leave out singular values that are not above the floor."""
    count = int(np.count_nonzero(s > floor))
    return u[:, :count], s[:count], vt[:count]
