"""LoRA adapters as values: factors per module with the scale folded in, stacked, measured, and drawn from a key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fedtune.errors import ShapeError
from fedtune.seeds import derive, generator
from fedtune.tensors import Array, Tensors


@dataclass(frozen=True)
class Factors:
    """The low-rank change b @ a of one linear layer; the LoRA scale is folded into b."""

    a: Array
    """(rank, in)"""
    b: Array
    """(out, rank)"""

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise ShapeError(f"expected a (rank, in) and b (out, rank); got a {self.a.shape} and b {self.b.shape}")

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the layer."""
        return int(self.b.shape[0]), int(self.a.shape[1])


Adapter: TypeAlias = Mapping[str, Factors]
"""Factors by full module name, e.g. `model.layers.0.self_attn.q_proj`. A missing module is a change of zero."""


def stack(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """Concatenate factors so that delta(stack) equals the weighted sum of the deltas exactly.

    Ranks may differ: A is (rank, in), B is (out, rank); an adapter without a module adds nothing to it. The order
    of the result's columns is that of the arguments. FLoRA, Wang et al. 2024, arXiv 2409.05976, equation 6.

    Raises:
        ShapeError: if two adapters disagree on a module's in or out size.
    """
    stacked = {}
    # Sorted: the order of a set of strings differs from process to process.
    for name in sorted({name for adapter, _ in adapters for name in adapter}):
        parts = [(adapter[name], weight) for adapter, weight in adapters if name in adapter]
        if len({factors.shape for factors, _ in parts}) > 1:
            raise ShapeError(f"{name}: expected one (out, in); got {sorted({f.shape for f, _ in parts})}")
        stacked[name] = Factors(
            a=np.concatenate([factors.a.astype(np.float32) for factors, _ in parts]),  # (R, in)
            b=np.concatenate([weight * factors.b.astype(np.float64) for factors, weight in parts], axis=1).astype(
                np.float32
            ),  # (out, R)
        )
    return stacked


def delta(factors: Factors) -> Array:
    """Return the dense change b @ a, (out, in), in float64."""
    # In float64: what exact aggregation is checked against must not itself be rounded to float32.
    product: Array = factors.b.astype(np.float64) @ factors.a.astype(np.float64)
    return product


def inner(left: Factors, right: Factors) -> float:
    """Return the Frobenius inner product <b a, b' a'> from r x r' matrices only, in float64."""
    cross_b = left.b.astype(np.float64).T @ right.b.astype(np.float64)  # (r, r')
    cross_a = left.a.astype(np.float64) @ right.a.astype(np.float64).T  # (r, r')
    return float(np.sum(cross_b * cross_a))


def norm(adapter: Adapter) -> float:
    """Return the Frobenius norm of the adapter's change over all modules, without forming it."""
    # Rounding can leave a sum of squares a little below zero, whose root would be NaN; what is NaN must stay so, and
    # max returns its first argument where that is NaN.
    return float(np.sqrt(max(sum(inner(factors, factors) for factors in adapter.values()), 0.0)))


def draw_a(key: int, module: str, rank: int, in_features: int) -> Array:
    """Return a fresh A (rank, in): uniform in +-1/sqrt(in), which is Kaiming uniform with a = sqrt(5).

    The first rows do not depend on `rank`, so a client of a smaller rank holds a slice of a larger client's A.
    """
    # Row by row from one stream, so that a smaller rank is a prefix of a larger one.
    rows: Array = generator(derive(key, "lora.a", client=module)).random((rank, in_features), dtype=np.float32)
    # In place: the copies would take longer than the draw.
    rows *= 2.0
    rows -= 1.0
    rows /= np.float32(np.sqrt(in_features))
    return rows


def pack(adapter: Adapter) -> Tensors:
    """Return the adapter as flat tensors `<module>.a` and `<module>.b`, as they travel and are stored."""
    return {f"{name}.{side}": getattr(factors, side) for name, factors in adapter.items() for side in ("a", "b")}


def unpack(tensors: Tensors) -> Adapter:
    """Return the adapter that `pack` made flat, its factors in float32.

    Raises:
        ShapeError: if a factor lacks its partner, two factors disagree on the rank, or a tensor is neither .a nor .b.
    """
    adapter = {}
    if strange := sorted(key for key in tensors if not key.endswith((".a", ".b"))):
        raise ShapeError(f"expected only factors .a and .b; got {strange[0]!r}")
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        if f"{name}.a" not in tensors or f"{name}.b" not in tensors:
            raise ShapeError(f"{name}: expected both factors .a and .b; got only one of them")
        adapter[name] = Factors(
            a=tensors[f"{name}.a"].astype(np.float32, copy=False), b=tensors[f"{name}.b"].astype(np.float32, copy=False)
        )
    return adapter
