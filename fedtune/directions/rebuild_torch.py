"""Rebuilds with torch, on the device where a model's tensors lie: matrix products in place of butterflies.

Sums of integers below 2^24 are exact in float32, in whatever order a library adds them up; larger sums are split into
two such products. Transforms by matrix products: the FWHT of x as (a, b) is H_a X H_b.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from fedtune.directions.bank import DirectionBank, check_accumulators, value_bound
from fedtune.directions.blocks import BLOCK, FP32_LIMIT, all_blocks, positions, split_runs
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import SIGN_WORDS, Hadamard, walsh
from fedtune.directions.kron import Kron
from fedtune.directions.philox import Purpose, philox
from fedtune.directions.rebuild_numpy import unit_scale
from fedtune.directions.space import summands
from fedtune.errors import RoundError, ShapeError
from fedtune.tensors import DTYPES, Array

LinearMap = Callable[[torch.Tensor], torch.Tensor]

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WORD = 32
"""Bits of a random word."""
SIGN_BIT = -(2**31)
"""As int32: only the sign of a float32 is set."""
SPLIT_BITS = 12
"""Sums of up to 31 bits are split into a high part of at most 20 bits and a low one of 11 bits and a sign."""
MAX_DIRECTIONS = 64
"""Directions of the gaussian bank added up by one product: 8 * 2^11 * 64 is far below 2^24."""


class TorchRebuild(Protocol):
    """A way to rebuild tensors; all ways give the same bits, those of `rebuild_numpy.rebuild`."""

    def __call__(
        self,
        tensor: torch.Tensor,
        accumulators: Array,
        *,
        bank: DirectionBank,
        ordinal: int,
        exponent: int,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return w(A) of a tensor w0; arguments and errors are those of `rebuild_numpy.Rebuild`.

        `out` may be `tensor` itself. Beside the result it takes some ten MiB on a CPU, some hundred on a GPU.

        Raises:
            RoundError: also if torch is set to arithmetic that is not exact.
        """
        ...


@torch.no_grad()
def rebuild(
    tensor: torch.Tensor,
    accumulators: Array,
    *,
    bank: DirectionBank,
    ordinal: int,
    exponent: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `TorchRebuild`."""
    out = prepare_output(tensor, out)
    sums, unit = check_accumulators(bank, accumulators), float(unit_scale(bank, exponent))
    old, new, start = tensor.contiguous().view(-1), out.view(-1), 0
    for y in pieces(
        bank, sums, ordinal=ordinal, shape=tensor.shape, blocks=all_blocks(tensor.shape), device=tensor.device
    ):
        part = slice(start, start + len(y))
        # y * unit is exact, for unit is a power of two: whether `sub` fuses the multiplication changes no bit.
        new[part] = torch.sub(old[part].float(), y.float(), alpha=unit)
        start += len(y)
    return out


@torch.no_grad()
def displacement(
    bank: DirectionBank,
    accumulators: Array,
    *,
    ordinal: int,
    shape: Sequence[int],
    blocks: range | None = None,
    device: torch.device | None = None,
) -> torch.Tensor:
    """Return y as `bank.displacement` does, int32 (positions,), on a device."""
    chosen, device = all_blocks(shape) if blocks is None else blocks, device or torch.device("cpu")
    sums = check_accumulators(bank, accumulators)
    parts = pieces(bank, sums, ordinal=ordinal, shape=shape, blocks=chosen, device=device)
    # The empty tensor keeps the type where there are no positions.
    return torch.cat([torch.empty(0, dtype=torch.int32, device=device), *(y.to(torch.int32) for y in parts)])


def rewriter(
    tensors: Sequence[tuple[int, torch.Tensor, torch.Tensor]], *, bank: DirectionBank, exponent: int
) -> Callable[[Array], None]:
    """Return a function that writes w(A) of many tensors of one device, given A, in the quickest installed way.

    Args:
        tensors: (ordinal, w0, the tensor that w(A) is written to), both contiguous.
        bank: the directions.
        exponent: e of the displacement unit 2^-e.

    Raises:
        ShapeError: if the shapes of a pair differ, or a number format is none of float32, float16 and bfloat16.
        RoundError: if torch's arithmetic is not exact.
    """
    rebuild_one: TorchRebuild = rebuild
    for _, old, new in tensors:
        prepare_output(old, new)
        rebuild_one = fastest(old.device)
    if rebuild_one is rebuild_compiled:
        from fedtune.directions import rebuild_numba

        arrays = [(ordinal, as_array(old.contiguous()), as_array(new)) for ordinal, old, new in tensors]
        return rebuild_numba.rewriter(arrays, bank=bank, exponent=exponent, threads=torch.get_num_threads())

    def rewrite(accumulators: Array) -> None:
        for ordinal, old, new in tensors:
            rebuild_one(old, accumulators, bank=bank, ordinal=ordinal, exponent=exponent, out=new)

    return rewrite


def fastest(device: torch.device) -> TorchRebuild:
    """Return the quickest way to rebuild tensors on a device: numba's on a CPU where it is installed, else torch's."""
    return rebuild_compiled if device.type == "cpu" and importlib.util.find_spec("numba") else rebuild


def rebuild_compiled(
    tensor: torch.Tensor,
    accumulators: Array,
    *,
    bank: DirectionBank,
    ordinal: int,
    exponent: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `TorchRebuild`; numba works on the memory of CPU tensors, in as many threads as torch has.

    Raises:
        ExtraError: without numba.
    """
    from fedtune.directions import rebuild_numba

    out = prepare_output(tensor, out)
    rebuild_numba.rebuild(
        as_array(tensor.contiguous()),
        accumulators,
        bank=bank,
        ordinal=ordinal,
        exponent=exponent,
        out=as_array(out),
        threads=torch.get_num_threads(),
    )
    return out


def as_array(tensor: torch.Tensor) -> Array:
    """Return a contiguous CPU tensor's memory as an array that shares it: a write to either is seen in both."""
    detached = tensor.detach()
    if detached.dtype != torch.bfloat16:
        return detached.numpy()
    # torch refuses to hand bfloat16 to numpy, which has no such type of its own; the bits go as uint16.
    return detached.view(torch.uint16).numpy().view(DTYPES["bf16"])


def prepare_output(tensor: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """Return the tensor that takes the result.

    Raises:
        ShapeError: if it does not fit, or a number format is none of float32, float16 and bfloat16.
        RoundError: if torch's arithmetic is not exact.
    """
    out = torch.empty_like(tensor, memory_format=torch.contiguous_format) if out is None else out
    if out.shape != tensor.shape or not out.is_contiguous() or out.device != tensor.device:
        raise ShapeError(
            f"expected a contiguous result of shape {tuple(tensor.shape)} on {tensor.device}; "
            f"got {tuple(out.shape)} on {out.device}; make a new tensor"
        )
    for side in (tensor, out):
        if side.dtype not in SUPPORTED_DTYPES:
            raise ShapeError(f"expected weights in {', '.join(DTYPES)}; got {side.dtype}; cast them")
    check_exact(tensor.device)
    return out


def check_exact(device: torch.device) -> None:
    """Raise RoundError if torch would round products to TF32 or bfloat16, or flush subnormal numbers to zero."""
    # All three are process-wide switches that other code may have set; each would change weights without an error.
    backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    for precision in (getattr(torch.backends, "fp32_precision", "none"), backend.matmul.fp32_precision):
        if precision not in ("none", "ieee"):
            raise RoundError(
                f"expected matrix products in full float32; got {precision!r}; "
                "call torch.set_float32_matmul_precision('highest')"
            )
    if not torch.full((1,), 1e-40, device=device).mul(1.0).any():
        raise RoundError("expected subnormal numbers; got them as zero; call torch.set_flush_denormal(False)")


def pieces(
    bank: DirectionBank,
    accumulators: Array,
    *,
    ordinal: int,
    shape: Sequence[int],
    blocks: range,
    device: torch.device,
) -> Iterator[torch.Tensor]:
    """Yield y of a run of blocks in flat pieces: float32 where that is exact, integers beyond; no zero is -0."""
    # Of all banks together: then every sum of them is exact as well.
    exact = value_bound(bank, accumulators) < FP32_LIMIT
    parts = [
        plain_pieces(
            plain,
            torch.from_numpy(rows.copy()).to(device),
            exact=exact,
            ordinal=ordinal,
            shape=shape,
            blocks=blocks,
        )
        for plain, rows in summands(bank, accumulators, ordinal)
    ]
    for first, *others in zip(*parts, strict=True):
        y = first
        for other in others:
            y = y + other
        yield y


def plain_pieces(
    bank: DirectionBank, sums: torch.Tensor, *, exact: bool, ordinal: int, shape: Sequence[int], blocks: range
) -> Iterator[torch.Tensor]:
    """Yield what one plain bank adds to y, given its accumulators as `space.summands` returns them, on their device."""
    # Blocks at a time: 2 MiB of float32 stay in a CPU's cache; a GPU needs 64 MiB to have work for all of its cores.
    length = 128 if sums.device.type == "cpu" else 4096
    if isinstance(bank, Kron) and len(shape) > 1:
        yield from kron_pieces(bank, sums, exact=exact, ordinal=ordinal, shape=shape, blocks=blocks, length=length)
        return
    if isinstance(bank, Gaussian):
        for run in split_runs(blocks, max(1, length // MAX_DIRECTIONS)):
            yield gaussian_sums(bank, sums, run, ordinal)[: len(positions(run, shape))]
        return
    dense = bank.vectors if isinstance(bank, Kron) else bank
    if not isinstance(dense, Hadamard):  # a bank that has no torch code here
        for y in bank.pieces(sums.cpu().numpy(), ordinal=ordinal, shape=shape, blocks=blocks):
            yield torch.from_numpy(y).to(sums.device)
        return
    for run in split_runs(blocks, length):
        linear = hadamard_map(dense, run, ordinal, sums.device)
        yield apply_linear(linear, sums, exact=exact)[: len(positions(run, shape))]


def apply_linear(linear: LinearMap, sums: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """Return linear(sums) exactly: by one float32 product where that is exact, else by two, for high and low bits."""
    if exact:
        return linear(sums.float())
    high = (sums.long() + 2 ** (SPLIT_BITS - 1)) >> SPLIT_BITS  # the low part is at most 2^11 either way
    low = sums - (high << SPLIT_BITS)
    return (linear(high.float()).long() << SPLIT_BITS) + linear(low.float()).long()


def hadamard_map(bank: Hadamard, run: range, ordinal: int, device: torch.device) -> LinearMap:
    """Return the linear map from (K,) or (groups, K) to the displacements of a run of blocks, whose signs it keeps."""
    columns = max(WORD, 1 << (bank.size.bit_length() // 2))  # b
    rows = max(1, bank.size // columns)  # a; below K = 32 one row holds several groups
    drawn = words(bank.key, Purpose.DENSE_SIGNS, run, calls=SIGN_WORDS // 4, ordinal=ordinal, device=device)
    first, second = (
        sign_flips(half.reshape(-1, rows, columns // WORD).transpose(0, 1).contiguous()).view(rows, -1, columns)
        for half in (drawn[:, : SIGN_WORDS // 2], drawn[:, SIGN_WORDS // 2 :])
    )  # (a, groups, b) each
    left = torch.from_numpy(walsh(rows)).to(device, torch.float32)
    own = torch.from_numpy(walsh(min(bank.size, columns))).to(device, torch.float32)
    right = torch.block_diag(*[own] * (columns // len(own)))

    def linear(sums: torch.Tensor) -> torch.Tensor:
        # One row for all blocks, or a row for each, which all transforms of the block start from.
        table = sums.view(-1, bank.size).repeat(1, max(1, columns // bank.size))
        tiled = table.view(-1, rows, columns).transpose(0, 1)
        if len(table) > 1:
            numbers = torch.arange(run.start, run.stop, device=device) % len(table)
            tiled = tiled.index_select(1, numbers.repeat_interleave(BLOCK // (rows * columns)))
        # Flipping the sign bit is exact and cheaper than a product with +1 or -1.
        x = (first ^ tiled.contiguous().view(torch.int32)).view(torch.float32)  # (a, groups, b)
        y = left @ (x.view(-1, columns) @ right).view(rows, -1)  # (a, groups * b)
        y.view(torch.int32).bitwise_xor_(second.view(rows, -1))
        # A flipped zero is -0; adding 0.0 makes it +0. Otherwise w0 = -0.0 minus it would lose its sign.
        return torch.add(y.view(rows, -1, columns).transpose(0, 1), 0.0).reshape(-1)

    return linear


def kron_pieces(
    bank: Kron, sums: torch.Tensor, *, exact: bool, ordinal: int, shape: Sequence[int], blocks: range, length: int
) -> Iterator[torch.Tensor]:
    """Yield the displacements of a matrix, some rows at a time."""
    u, v = (torch.from_numpy(factor).to(sums.device, torch.float32) for factor in bank.factors(ordinal, shape))
    columns, real = max(1, shape[1]), positions(blocks, shape)
    step = max(1, length * BLOCK // columns)
    for row in range(real.start // columns, -(-real.stop // columns), step):
        rows = u[:, row : row + step].T  # (rows, p)

        # `rows` as a default: a closure would read the loop's variable when it is called.
        def linear(part: torch.Tensor, rows: torch.Tensor = rows) -> torch.Tensor:
            return (rows @ (part.view(bank.rank, bank.rank) @ v)).add_(0.0).view(-1)

        first = row * columns
        yield apply_linear(linear, sums, exact=exact)[max(0, real.start - first) : max(0, real.stop - first)]


def gaussian_sums(bank: Gaussian, sums: torch.Tensor, run: range, ordinal: int) -> torch.Tensor:
    """Return the displacements of a run of blocks, int64."""
    if sums.dim() > 1:
        # Two runs of blocks cannot share what is drawn for a direction: each has words of its own anyhow.
        rows = [sums[block % len(sums)] for block in run]
        return torch.cat([gaussian_sums(bank, row, range(b, b + 1), ordinal) for b, row in zip(run, rows, strict=True)])
    y = torch.zeros(len(run) * BLOCK, dtype=torch.int64, device=sums.device)
    used = torch.nonzero(sums).view(-1)
    for group in used.split(MAX_DIRECTIONS) if len(used) else ():  # an empty tensor is split into one empty part
        drawn = torch.stack(
            [
                words(
                    bank.key,
                    Purpose.GAUSSIAN,
                    run,
                    calls=BLOCK // 8,
                    ordinal=ordinal,
                    device=sums.device,
                    direction=k,
                )
                for k in group.tolist()
            ]
        )  # (directions, blocks, 2048)
        halves = torch.stack([drawn & 0xFFFF, (drawn >> 16) & 0xFFFF], dim=-1)
        m = count_bits(halves).view(len(group), -1).float() - 8.0

        def linear(part: torch.Tensor, m: torch.Tensor = m) -> torch.Tensor:
            return part @ m

        y += apply_linear(linear, sums[group], exact=False)
    return y


def count_bits(values: torch.Tensor) -> torch.Tensor:
    """Return the number of bits set in each 16-bit value, by adding neighbouring fields of 1, 2, 4 and 8 bits."""
    v = values - ((values >> 1) & 0x5555)
    v = (v & 0x3333) + ((v >> 2) & 0x3333)
    v = (v + (v >> 4)) & 0x0F0F
    return (v + (v >> 8)) & 0x001F


def sign_flips(drawn: torch.Tensor) -> torch.Tensor:
    """Return each bit of the words, lowest first, at the position of a float32's sign: int32 (..., words, 32)."""
    places = torch.arange(WORD - 1, -1, -1, dtype=torch.int32, device=drawn.device)
    return torch.bitwise_left_shift(drawn.unsqueeze(-1), places).bitwise_and_(SIGN_BIT)


def words(
    key: int, purpose: Purpose, run: range, *, calls: int, ordinal: int, device: torch.device, direction: int = 0
) -> torch.Tensor:
    """Return the words that `philox.words` returns, as int32 of the same bits: torch has few operations on uint32."""
    call = torch.arange(calls, device=device)
    block = torch.arange(run.start, run.stop, device=device)[:, None]
    third, fourth = torch.tensor(purpose | direction << 8, device=device), torch.tensor(ordinal, device=device)
    drawn = torch.broadcast_tensors(*philox((call, block, third, fourth), key))
    return torch.stack(drawn, dim=-1).view(len(run), 4 * calls).to(torch.int32)
