"""Weights in 4 or 8 bits, NF4 in blocks of 64 inputs and int8 by row: codes and values are bitsandbytes', bit for bit.

Everything is a table, a division and a product in float32, so that every machine gets the same bits.

Shapes: a weight is (out, in); NF4 codes are (out, padded / 2) with the first of two in the high half of a byte, and
their scales (out, padded / 64), where padded is the next multiple of 64; int8 codes are (out, in), and scales (out,).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch.nn.functional import pad

from fedtune.model.settings import QuantisedFormat

BLOCK = 64
"""Inputs that share a scale in NF4."""
LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""NF4's values, as public in bitsandbytes: quantiles of a normal distribution (QLoRA, arXiv 2305.14314, appendix E)."""
SMALLEST = 1e-38
"""Least divisor of a block: one of zeros alone stays zeros."""
PER_INT8 = 7.874015718698502e-3
"""1 / 127 as bitsandbytes writes it; rounded to float32 where it is used."""
PIECE = 2**20
"""Weights that are quantised together: what is computed on the way is that large, and not a layer."""

BITS: Mapping[QuantisedFormat, int] = {"nf4": 4, "int8": 8}


@dataclass(frozen=True, eq=False)
class QuantisedWeight:
    """The codes of a weight matrix, and what scales them."""

    kind: QuantisedFormat
    codes: torch.Tensor
    """uint8 for NF4, int8 for int8."""
    scales: torch.Tensor
    """float32: the largest absolute value of each block, or row."""
    shape: tuple[int, int]
    """(out, in)"""


def quantise(weight: torch.Tensor, kind: QuantisedFormat) -> QuantisedWeight:
    """Return the nearest codes of a weight matrix (out, in), computed on the CPU.

    A last block of fewer than 64 inputs has a scale of its own. Rows may be taken out before or after; columns may
    not, because they share scales.
    """
    assert weight.ndim == 2
    rows = max(1, PIECE // max(1, weight.shape[1]))
    by_row = _nf4_codes if kind == "nf4" else _int8_codes
    parts = [by_row(part.detach().to("cpu", torch.float32).contiguous()) for part in weight.split(rows)]
    codes, scales = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    return QuantisedWeight(kind, codes, scales, (weight.shape[0], weight.shape[1]))


def _nf4_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    m, n = weight.shape
    blocks = pad(weight, (0, -n % BLOCK)).view(m, -1, BLOCK)
    scales = blocks.abs().amax(-1)  # (m, blocks)
    # Times the reciprocal, and not divided by the scale: other last bits would put a few weights in the next bin.
    unit = (blocks * (1.0 / scales.clamp(min=SMALLEST))[..., None]).clamp(-1, 1)
    codes = torch.bucketize(unit, midpoints(), out_int32=True).to(torch.uint8).view(m, -1)
    return (codes[:, ::2] << 4) | codes[:, 1::2], scales


def _int8_codes(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales = weight.abs().amax(1)
    factor = torch.where(scales > 0, 127.0 / scales.clamp(min=SMALLEST), 0.0)
    return torch.round(weight * factor[:, None]).clamp(-127, 127).to(torch.int8), scales


def dequantise(weight: QuantisedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return the matrix (out, in) of codes, rounded from float32 to a format; NF4's may have gaps."""
    (m, n), scales = weight.shape, weight.scales
    if weight.kind == "int8":
        # One product after the other, as bitsandbytes: a table of scale / 127 would give other last bits.
        return torch.mul(weight.codes, scales[:, None]).mul_(PER_INT8).to(dtype)
    # Both values of a byte as one number of 64 bits: half as many look-ups.
    pairs = pair_table(weight.codes.device).index_select(0, weight.codes.view(-1).int())
    values = pairs.view(torch.float32).view(m, -1, BLOCK).mul_(scales[..., None])
    return values.view(m, -1)[:, :n].to(dtype)


@lru_cache(maxsize=1)
def midpoints() -> torch.Tensor:
    """Return the bounds between the levels, float32 (15,): a weight on a bound takes the lower level."""
    levels = torch.tensor(LEVELS)
    return (levels[:-1] + levels[1:]) / 2


@lru_cache(maxsize=8)
def pair_table(device: torch.device) -> torch.Tensor:
    """Return the two levels of each byte, as the bits of one number: int64 (256,)."""
    # Also where the caller only evaluates: the table is used in training next.
    with torch.inference_mode(False):
        levels = torch.tensor(LEVELS)
        pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], 1)  # (256, 2)
        return pairs.view(torch.int64).view(-1).to(device)


def weight_bytes(shape: tuple[int, int], kind: QuantisedFormat) -> int:
    """Return what the codes and scales of a layer (out, in) take in memory."""
    m, n = shape
    blocks = -(-n // BLOCK)
    return m * blocks * (BLOCK // 2 + 4) if kind == "nf4" else m * (n + 4)
