"""Moments of the outputs of heads and channels, by which the columns that a pruned layer keeps make up for the others.

A layer W that reads heads or channels x loses the columns `rest`. What they read follows from what is kept by least
squares over x: x_rest = M x_kept + c, with M = C_rk (C_kk + 0.01 mean(diag C_kk) I)^-1, C the covariance of x and
c = mean_rest - M mean_kept. So W_kept + W_rest M and the bias + W_rest c replace them, at no cost in a forward pass.
(FLAP, arXiv 2312.11983, takes M = 0.)

C = U U^T + diag(d^2) travels as factors: C itself has n^2 numbers a layer. With n columns in U it is exact. It is
symmetric and has no negative eigenvalue, whatever numbers come.

n: heads * head_dim, or channels; r: columns of U
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from fedtune.errors import ShapeError
from fedtune.pruning.ranking import PruningSettings
from fedtune.pruning.structure import BlockLayout
from fedtune.tensors import Array, Tensors

RIDGE = 0.01
"""Of the mean variance of what is kept, added to each: without it, few rows would make M fit their noise."""
LARGEST_SHARE = 10.0
"""Times the cohort's median mean square of a layer that one client's moments count at most."""
TRAVELLING = np.dtype(np.float16)
"""Number format of moments between server and clients."""


def input_widths(layout: BlockLayout) -> Mapping[str, int]:
    """Return n of the layers whose input is heads or channels, by full name, in the order of the blocks."""
    return {
        name: block.heads * block.head_dim if into == "q" else block.channels
        for name, (index, _, into) in layout.sides.items()
        if into in ("q", "ff")
        for block in (layout.blocks[index],)
    }


def moments_rank(settings: PruningSettings, n: int) -> int:
    """Return the columns of U of a layer."""
    return min(n, settings.repair_rank) if settings.repair == "least-squares" else 0


def moment_shapes(settings: PruningSettings, layout: BlockLayout) -> Mapping[str, tuple[int, ...]]:
    """Return the shape of every tensor of moments: `<layer>.mean`, and with least squares `.u` and `.deviation` (d)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, n in input_widths(layout).items():
        shapes[f"{name}.mean"] = (n,)
        if settings.repair == "least-squares":
            shapes |= {f"{name}.deviation": (n,), f"{name}.u": (n, moments_rank(settings, n))}
    return shapes


def check_moments(moments: Tensors, settings: PruningSettings, layout: BlockLayout) -> Tensors:
    """Return moments if they are of this base's layers, and finite.

    Raises:
        ShapeError: naming the tensor: one is missing or unknown, of another shape, not finite, or a negative deviation.
    """
    wanted = moment_shapes(settings, layout)
    if strange := sorted(wanted.keys() ^ moments.keys()):
        got = "none" if strange[0] in wanted else "another tensor"
        raise ShapeError(f"moments, {strange[0][:120]}: expected those of this base's layers; got {got}")
    for name, shape in wanted.items():
        array = moments[name]
        if array.shape != shape:
            raise ShapeError(f"moments, {name}: expected {shape}, as this base is wide; got {array.shape}")
        if not np.isfinite(array).all():
            raise ShapeError(f"moments, {name}: expected finite numbers; got others")
        if name.endswith(".deviation") and (array < 0).any():
            raise ShapeError(f"moments, {name}: expected none below 0; got {float(array.min()):.3g}")
    return moments


def moments_to_wire(moments: Tensors) -> Tensors:
    """Return moments as they travel, in float16."""
    # Clipped first: an infinite one would be refused.
    largest = float(np.finfo(TRAVELLING).max)
    return {name: np.clip(array, -largest, largest).astype(TRAVELLING) for name, array in moments.items()}


def pool_moments(
    parts: Sequence[tuple[Tensors, float]], before: Tensors, settings: PruningSettings, layout: BlockLayout
) -> Tensors:
    """Return the moments of all clients' inputs together, float32: half of what they were, half of the cohort's.

    They are those of a mixture, in which client k has the weight p_k, up to the rank of U; what is cut off stays in d.

    Args:
        parts: moments of each client, with its weight p_k.
        before: pooled moments so far; empty before the first time.
        settings: with the rank of U.
        layout: of the base.
    """
    total = sum(weight for _, weight in parts)
    mixture = [(own, weight / total) for own, weight in parts]
    if before:
        mixture = [(before, 0.5), *((own, 0.5 * share) for own, share in mixture)]
    pooled: dict[str, Array] = {}
    for name, n in input_widths(layout).items():
        layers = [{side: own[f"{name}.{side}"].astype(np.float64) for side in sides(settings)} for own, _ in mixture]
        # Without this, one client with inputs of a thousand times the size would be all that counts.
        scales = shrink_factors([mean_square(own) for own in layers])
        scaled = [
            ({side: array * scale for side, array in own.items()}, share)
            for own, scale, (_, share) in zip(layers, scales, mixture, strict=True)
        ]
        merged = merge_layer(scaled, rank=moments_rank(settings, n))
        pooled |= {f"{name}.{side}": array.astype(np.float32) for side, array in merged.items()}
    return pooled


def sides(settings: PruningSettings) -> Sequence[str]:
    return ("mean", "deviation", "u") if settings.repair == "least-squares" else ("mean",)


def mean_square(layer: Tensors) -> float:
    """Return the mean over the inputs of E[x^2]."""
    square = np.square(layer["mean"])
    if "u" in layer:
        square = square + np.square(layer["deviation"]) + np.square(layer["u"]).sum(axis=1)
    return float(square.mean())


def shrink_factors(squares: Sequence[float]) -> Sequence[float]:
    """Return by what to multiply each client's numbers, so that no mean square is above that share of the median."""
    # Of two the smaller one, as with scores.
    most = LARGEST_SHARE * sorted(squares)[(len(squares) - 1) // 2]
    return [1.0 if square <= most else (most / square) ** 0.5 for square in squares]


def merge_layer(parts: Sequence[tuple[Tensors, float]], *, rank: int) -> Mapping[str, Array]:
    """Return the moments of a mixture of one layer's inputs, float64; the shares sum to 1."""
    mean = sum(share * own["mean"] for own, share in parts)
    if not any("u" in own for own, _ in parts):
        return {"mean": np.asarray(mean)}
    # Cov = sum p_k (U_k U_k^T + d_k^2 + (m_k - m)(m_k - m)^T)
    columns = [share**0.5 * own["u"] for own, share in parts]
    columns += [share**0.5 * (own["mean"] - mean)[:, None] for own, share in parts if len(parts) > 1]
    u = np.concatenate(columns, axis=1)
    variance = np.square(u).sum(axis=1) + sum(share * np.square(own["deviation"]) for own, share in parts)
    if u.shape[1] > rank:
        left, values, _ = np.linalg.svd(u, full_matrices=False)
        u = left[:, :rank] * values[:rank]
    rest = np.maximum(variance - np.square(u).sum(axis=1), 0.0)
    return {"mean": np.asarray(mean), "deviation": np.sqrt(rest), "u": u}
