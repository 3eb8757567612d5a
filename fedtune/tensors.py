"""Named numpy arrays: casts, weighted means, norms and digests, with one fixed order of reduction."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from fedtune.errors import ShapeError

Array: TypeAlias = NDArray[Any]
Tensors: TypeAlias = Mapping[str, Array]

DTYPES: Mapping[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
"""The number formats a tensor may travel in, by the name that recipes use."""


def cast(tensors: Tensors, dtype: str) -> Tensors:
    """Return the tensors in a wire format of `DTYPES`; an array that has it already is not copied."""
    return {name: array.astype(DTYPES[dtype], copy=False) for name, array in tensors.items()}


def weighted_mean(parts: Sequence[tuple[Tensors, float]]) -> Tensors:
    """Return sum of weight * tensors over the sum of weights, as float32, summed in float64 in the given order.

    Raises:
        ShapeError: if two parts disagree on a name or a shape.
    """
    total = sum(weight for _, weight in parts)
    first, _ = parts[0]
    mean = {}
    for name in sorted(first):
        acc = np.zeros(first[name].shape, np.float64)
        for tensors, weight in parts:
            if tensors.keys() != first.keys() or tensors[name].shape != acc.shape:
                raise ShapeError(
                    f"{name}: expected the same names and shape {acc.shape} from every client; "
                    f"got {tensors[name].shape if name in tensors else 'no such tensor'}"
                )
            acc += (weight / total) * tensors[name].astype(np.float64)
        mean[name] = acc.astype(np.float32)
    return mean


def l2_norm(tensors: Tensors) -> float:
    """Return the L2 norm over all entries of all tensors, summed in float64; it is finite if and only if they all are.

    (The square of the largest float32 is far below the largest float64.)
    """
    return float(np.sqrt(sum(squared_norm(tensor) for tensor in tensors.values())))


def squared_norm(tensor: Array) -> float:
    """Return the sum of squares of an array of at most 32-bit floats, in float64."""
    with np.errstate(
        invalid="ignore"
    ):  # a signalling NaN, which only a foreign body holds: the sum says it all the same
        flat = tensor.astype(np.float64).reshape(-1)
        return float(flat @ flat)


def count_not_finite(tensor: Array) -> int:
    """Return how many numbers of an array are infinite or NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        # One sum in place of a mask of the tensor's size: it is finite only where every number is.
        if np.isfinite(tensor.sum(dtype=np.float64)):
            return 0
    # Numbers of 64 bits may be finite and their sum not.
    return int(tensor.size - np.count_nonzero(np.isfinite(tensor)))


def num_bytes(tensors: Tensors) -> int:
    """Return the payload size in bytes: entries times item size, without any header."""
    return sum(array.nbytes for array in tensors.values())


def digest(tensors: Tensors) -> str:
    """Return the SHA-256 (hex) of names, dtypes, shapes and bytes, independent of the mapping's order."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        sha.update(f"{name}\0{array.dtype.name}\0{array.shape}\0".encode())
        sha.update(array.tobytes())
    return sha.hexdigest()
