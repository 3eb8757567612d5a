"""The weights of a tensor after any history, from its first weights and K integers: the reference, with numpy.

    w = RNE_c( RNE_fp32( fp32(w0) - fp32(y) * 2^-e ) )        y = sum_k A_k m_k, an integer at every position

c is the format of the result. fp32(y) is exact below 2^24 and rounded to nearest even above; the product is exact, so
that a fused multiply-add cannot change a bit; subnormal numbers are kept, and y = 0 leaves w0 as it is, -0.0 included.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fedtune.directions.bank import DirectionBank, check_accumulators
from fedtune.directions.blocks import all_blocks
from fedtune.errors import ConfigError, Fault, ShapeError
from fedtune.tensors import DTYPES, Array

EXPONENTS = range(126)
"""Legal e of the displacement unit u = 2^-e: y * u is then a normal float32, whatever y."""


class Rebuild(Protocol):
    """A way to rebuild a tensor from accumulators; all ways give the same bits."""

    def __call__(
        self,
        tensor: Array,
        accumulators: Array,
        *,
        bank: DirectionBank,
        ordinal: int,
        exponent: int,
        out: Array | None = None,
    ) -> Array:
        """Return w(A) of a tensor w0; see `bank.perturb` for weights beside w(A).

        Args:
            tensor: w0, finite, in float32, float16 or bfloat16; it is only changed if it is `out`.
            accumulators: A, int32 (K,).
            bank: the directions.
            ordinal: the tensor's place in the manifest.
            exponent: e of the displacement unit 2^-e.
            out: contiguous array of the tensor's shape that takes the result, in the format wanted; None makes a new
                one in the tensor's own format.

        Raises:
            ConfigError: if e is out of range, or the bank has no directions for this shape.
            RoundError: if a displacement could leave int32.
            ShapeError: if K, the shapes or the number formats do not fit.
        """
        ...


def rebuild(
    tensor: Array,
    accumulators: Array,
    *,
    bank: DirectionBank,
    ordinal: int,
    exponent: int,
    out: Array | None = None,
) -> Array:
    """See `Rebuild`; this is the reference that every other way is tested against."""
    out = prepare_output(tensor, out)
    blocks, sums, unit = all_blocks(tensor.shape), check_accumulators(bank, accumulators), unit_scale(bank, exponent)
    old, new, start = np.ascontiguousarray(tensor).reshape(-1), out.reshape(-1), 0
    for y in bank.pieces(sums, ordinal=ordinal, shape=tensor.shape, blocks=blocks):
        subtract(old[start : start + len(y)], y, unit, new[start : start + len(y)])
        start += len(y)
    return out


def subtract(old: Array, y: Array, unit: np.float32, new: Array) -> None:
    """Write old - y * unit into `new` by the rounding rule of this module."""
    # In float32 whatever the base's format: a 16-bit difference would lose most small displacements.
    round_into(old.astype(np.float32) - y.astype(np.float32) * unit, new)


def round_into(wide: Array, new: Array) -> None:
    """Write float32 numbers in another format, to nearest even."""
    # A weight beyond the format's range is infinite by the rule: the loss shows it, not a warning.
    with np.errstate(over="ignore"):
        new[...] = wide.astype(new.dtype)


def unit_scale(bank: DirectionBank, exponent: int) -> np.float32:
    """Return the factor 2^-(e + halvings) between the integers y and a weight's own unit.

    Raises:
        ConfigError: if e is out of range.
    """
    if exponent not in EXPONENTS:
        raise ConfigError(
            Fault("exponent", f"{EXPONENTS.start} to {EXPONENTS.stop - 1}", str(exponent), "choose another scalar step")
        )
    return np.float32(2.0 ** -(exponent + bank.halvings))


def prepare_output(tensor: Array, out: Array | None) -> Array:
    """Return the array that takes the result.

    Raises:
        ShapeError: if it does not fit the tensor, or a number format is none of float32, float16 and bfloat16.
    """
    out = np.empty(tensor.shape, tensor.dtype) if out is None else out
    # Contiguous, or `reshape(-1)` would give a copy, and the result would be written into nothing.
    if out.shape != tensor.shape or not out.flags.c_contiguous:
        raise ShapeError(f"expected a contiguous result of shape {tensor.shape}; got {out.shape}; make a new array")
    for array in (tensor, out):
        if array.dtype not in DTYPES.values():
            raise ShapeError(f"expected weights in {', '.join(DTYPES)}; got {array.dtype}; cast them")
    return out
