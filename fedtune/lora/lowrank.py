"""Sums of low-rank changes as one singular value decomposition, without forming the dense matrix; exact truncation."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, TypeVar

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


Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class LowRank:
    """The change u @ diag(s) @ vt of one linear layer: orthonormal u and vt, s falling and positive; float32."""

    u: Array
    """(out, rank)"""
    s: Array
    """(rank,)"""
    vt: Array
    """(rank, in)"""
    dropped: float = 0.0
    """Sum of the squared singular values that truncation has cut off so far."""

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
        return replace(self, u=self.u[:, start:stop], s=self.s[start:stop], vt=self.vt[start:stop])


@dataclass(frozen=True)
class _Svd:
    """A singular value decomposition in float64, s falling, whose vectors are formed only as far as they are wanted."""

    left: tuple[Array, Array]
    """(m, k), (k, p): their product is u."""
    s: Array
    """(p,)"""
    right: tuple[Array, Array]
    """(p, k), (k, n): their product is vt."""

    def vectors(self, size: int) -> tuple[Array, Array]:
        """Return the leading vectors u (m, size) and vt (size, n)."""
        (x, left), (right, y) = self.left, self.right
        return x @ left[:, :size], right[:size] @ y

    def above(self, floor: float) -> _Svd:
        """Leave out singular values that are not above the floor."""
        size = int(np.count_nonzero(self.s > floor))
        (x, left), (right, y) = self.left, self.right
        return _Svd((x, left[:, :size]), self.s[:size], (right[:size], y))


def zero(out_features: int, in_features: int) -> LowRank:
    """Return the change of nothing: rank 0."""
    return LowRank(
        u=np.zeros((out_features, 0), np.float32), s=np.zeros(0, np.float32), vt=np.zeros((0, in_features), np.float32)
    )


def compress(changes: Adapter) -> Mapping[str, LowRank]:
    """Return the singular value decomposition of every module's b @ a, exact to float32."""
    return weighted_sums({name: [(factors, 1.0)] for name, factors in changes.items()})


def weighted_sum(parts: Sequence[tuple[Factors, float]], max_rank: int | None = None) -> LowRank:
    """Return the sum of weight * b @ a over the parts (at least one), exact to float32 up to `max_rank`.

    Computed in float64 whatever the parts' format, and in the given order. Working memory is O(R(out + in)), R being
    the sum of the ranks; from R = min(out, in) on the dense sum is smaller, and is formed part by part. What is cut
    off at `max_rank` is the least that a change of that rank can leave out, and `dropped` says how much it was.

    Raises:
        ShapeError: if two parts disagree on the layer's out or in size.
    """
    shapes = {factors.shape for factors, _ in parts}
    if len(shapes) != 1:
        raise ShapeError(f"expected one (out, in) for all parts; got {sorted(shapes)}")
    (m, n), rank = shapes.pop(), sum(factors.rank for factors, _ in parts)
    wide = ((weight * f.b.astype(np.float64), f.a.astype(np.float64)) for f, weight in parts)  # (m, r_k), (r_k, n)
    wanted = min(m, n, rank) if max_rank is None else max_rank
    if rank < min(m, n):
        xs, ys = zip(*wide, strict=True)
        decomposed = _svd_of_product(np.concatenate(xs, axis=1), np.concatenate(ys))  # (m, R), (R, n)
    else:
        dense, floor = np.zeros((m, n)), 0.0
        for x, y in wide:
            dense += x @ y
            floor += _noise(x, y)
        decomposed = _svd_of_dense(dense, floor=floor, wanted=wanted)
    size = min(wanted, int(np.count_nonzero(decomposed.s > DROP * decomposed.s.max(initial=0.0))))
    u, vt = decomposed.vectors(size)
    dropped = float(np.sum(np.square(decomposed.s[size:]))) if size == max_rank else 0.0
    return of_triples(u, decomposed.s[:size], vt, dropped=dropped)


def of_triples(u: Array, s: Array, vt: Array, *, dropped: float = 0.0) -> LowRank:
    """Return singular triples as a change in float32, with the largest entry of every column of u positive."""
    # The sign of a singular pair is free; fixing it makes equal changes equal factors.
    sign = np.sign(u[np.abs(u).argmax(axis=0), np.arange(s.size)])
    return LowRank(
        u=(u * sign).astype(np.float32),
        s=s.astype(np.float32),
        vt=(vt.T * sign).T.astype(np.float32),
        dropped=dropped,
    )


def whole(dense: Array) -> LowRank:
    """Return all singular triples of a matrix."""
    u, s, vt = np.linalg.svd(dense.astype(np.float64), full_matrices=False)
    size = int(np.count_nonzero(s > DROP * s.max(initial=0.0)))
    return of_triples(u[:, :size], s[:size], vt[:size])


def weighted_sums(
    parts: Mapping[str, Sequence[tuple[Factors, float]]], max_rank: int | None = None
) -> Mapping[str, LowRank]:
    """Return `weighted_sum` of every module, as many modules at a time as there are cores."""
    return each_quietly(partial(weighted_sum, max_rank=max_rank), parts)


def each_quietly(work: Callable[[Item], Result], items: Mapping[str, Item]) -> Mapping[str, Result]:
    """Return what `work` makes of every item, as many at a time as there are cores.

    BLAS is held to one thread meanwhile: its threads gain nothing on matrices of R x R, stall when another process
    wants a core, and would let the core count decide the last bits.
    """

    def quietly(item: Item) -> Result:
        # A thread does not inherit its caller's settings. What overflows is found in the result, where it is refused.
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return work(item)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(min(cores, max(1, len(items)))) as pool:
        return dict(zip(items, pool.map(quietly, items.values()), strict=True))


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


class Change(Protocol):
    """What a change of a linear layer says of itself, whichever form it has."""

    @property
    def rank(self) -> int: ...
    @property
    def factors(self) -> Factors: ...


def adapter(changes: Mapping[str, Change]) -> Adapter:
    """Return the changes as an adapter of scale 1; a module of rank 0 is left out."""
    return {name: low.factors for name, low in changes.items() if low.rank}


def smallest(changes: Adapter) -> Tensors:
    """Return the changes as flat tensors: factors `.a` and `.b`, or the dense `.w` where that has fewer numbers."""
    flat: dict[str, Array] = {}
    for name, factors in changes.items():
        m, n = factors.shape
        if factors.rank * (m + n) >= m * n:
            flat[f"{name}.w"] = product(factors)
        else:
            flat |= {f"{name}.a": factors.a, f"{name}.b": factors.b}
    return flat


def product(factors: Factors) -> Array:
    """Return b @ a, (out, in); where one of them is the identity, the other as it is."""
    a, b = factors.a, factors.b
    if a.shape[0] == a.shape[1] and np.array_equal(a, np.eye(len(a), dtype=a.dtype)):
        return b
    if b.shape[0] == b.shape[1] and np.array_equal(b, np.eye(len(b), dtype=b.dtype)):
        return a
    dense: Array = b @ a
    return dense


def pack(changes: Mapping[str, LowRank]) -> Tensors:
    """Return the changes as flat tensors `<module>.u`, `.s`, `.vt` and, where any, `.dropped`, as states keep them."""
    flat = {f"{name}.{part}": getattr(low, part) for name, low in changes.items() for part in ("u", "s", "vt")}
    return flat | {f"{name}.dropped": np.array([low.dropped]) for name, low in changes.items() if low.dropped}


def unpack(tensors: Tensors) -> Mapping[str, LowRank]:
    """Return the changes that `pack` made flat."""
    names = [key.removesuffix(".s") for key in tensors if key.endswith(".s")]
    nothing = np.zeros(1)
    return {
        name: LowRank(
            u=tensors[f"{name}.u"],
            s=tensors[f"{name}.s"],
            vt=tensors[f"{name}.vt"],
            dropped=float(tensors.get(f"{name}.dropped", nothing)[0]),
        )
        for name in names
    }


def _sizes(x: Array, y: Array) -> Array:
    """Return |x_j| |y_j|, (R,), the norms of the rank-one terms of x @ y."""
    sizes: Array = np.linalg.norm(x, axis=0) * np.linalg.norm(y, axis=1)
    return sizes


def _noise(x: Array, y: Array) -> float:
    """Return the size below which a singular value of x @ y is rounding alone."""
    return ROUNDING * float(np.sum(_sizes(x, y)))


def _svd_of_product(x: Array, y: Array) -> _Svd:
    """Return the singular value decomposition of x @ y, x (m, R) and y (R, n), R < min(m, n)."""
    sizes = _sizes(x, y)
    # A term of zero would be divided by its own norm below.
    if not np.all(sizes):
        x, y = x[:, sizes > 0], y[sizes > 0]
    if not y.size:
        return _Svd((x, np.zeros((0, 0))), np.zeros(0), (np.zeros((0, 0)), y))
    return (_by_gram(x, y) or _by_qr(x, y)).above(_noise(x, y))


def _svd_of_dense(dense: Array, *, floor: float, wanted: int) -> _Svd:
    """Return the decomposition of a narrow layer's sum (m, n), whose smaller side is not above the sum's rank.

    All of them by a full decomposition. Of fewer, the eigenvectors of dense @ dense' are as good as the singular values
    above the root of float64's resolution are large; where `wanted` of them are not, by QR and a decomposition of the
    smaller side's size.
    """
    if wanted >= min(dense.shape):
        u, s, vt = np.linalg.svd(dense, full_matrices=False)
        return _Svd((u, np.eye(s.size)), s, (np.eye(s.size), vt)).above(floor)
    if dense.shape[0] > dense.shape[1]:
        turned = _svd_of_dense(dense.T, floor=floor, wanted=wanted)
        (v, right), (left, ut) = turned.left, turned.right
        return _Svd((ut.T, left.T), turned.s, (right.T, v.T))
    values, vectors = np.linalg.eigh(dense @ dense.T)
    values, vectors = values[::-1], vectors[:, ::-1]
    largest = values[0]
    values, vectors = values[values > 1e-14 * largest], vectors[:, values > 1e-14 * largest]
    if np.all(values[:wanted] >= 1e-9 * largest):
        s = np.sqrt(values)
        return _Svd((vectors, np.eye(s.size)), s, ((vectors / s).T, dense)).above(floor)
    q, r = np.linalg.qr(dense.T)  # (n, m), (m, m)
    u, s, vt = np.linalg.svd(r.T)
    return _Svd((u, np.eye(s.size)), s, (vt, q.T)).above(floor)


def _by_gram(x: Array, y: Array) -> _Svd | None:
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
    to_u = (balance[:, None] * v_x / root_x) @ core_u  # (R, p)
    to_vt = core_vt @ (v_y / root_y).T / balance  # (p, R)
    # One random vector shows the error of the whole product at the cost of three products with a vector.
    inner = y @ generator(derive(0, "lowrank.probe")).standard_normal(y.shape[1])
    exact = x @ inner
    error = np.linalg.norm(exact - x @ (to_u @ (s * (to_vt @ inner))))
    return _Svd((x, to_u), s, (to_vt, y)) if error <= DROP * np.linalg.norm(exact) else None


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


def _by_qr(x: Array, y: Array) -> _Svd:
    """Return the decomposition by way of two orthonormal bases: about eight times slower than Gram, always accurate."""
    q_x, r_x = np.linalg.qr(x)
    q_y, r_y = np.linalg.qr(y.T)
    core_u, s, core_vt = np.linalg.svd(r_x @ r_y.T)
    return _Svd((q_x, core_u), s, (core_vt, q_y.T))
