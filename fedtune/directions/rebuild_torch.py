"""Rebuilds with torch, on any device, of a model's tensors where they lie: matrix products in place of butterflies.

Sums of integers below 2^24 are exact in float32, in whatever order a library adds them up; larger ones are made of two
such products. Transforms by matrix products: FWHT of x as (a, b) is H_a X H_b.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch

from fedtune.directions.bank import FP32_LIMIT, DirectionBank, check_accumulators, value_bound
from fedtune.directions.blocks import BLOCK, positions, runs, whole
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.philox import Purpose, philox
from fedtune.directions.rebuild_numpy import scale
from fedtune.directions.signs import WORDS, walsh
from fedtune.errors import RoundError, ShapeError
from fedtune.tensors import DTYPES, Array

Linear = Callable[[torch.Tensor], torch.Tensor]

FORMATS = (torch.float32, torch.float16, torch.bfloat16)
WORD = 32
SIGN_BIT = -(2**31)
SPLIT_BITS = 12
DIRECTIONS = 64
"""Directions of the gaussian bank added up by one product: 8 * 2^11 * 64 is far below 2^24."""


class TorchRebuild(Protocol):
    """A way to rebuild tensors; all give the same bits, those of `rebuild.rebuild`."""

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
        """Return w(A) of a tensor w0; arguments and errors are those of `rebuild.Rebuild`.

        `out` may be `tensor` itself. Beside the result some ten MiB are taken on a CPU, some hundred on a GPU.

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
    sums, unit = check_accumulators(bank, accumulators), float(scale(bank, exponent))
    old, new, start = tensor.contiguous().view(-1), out.view(-1), 0
    for y in pieces(bank, sums, ordinal=ordinal, shape=tensor.shape, blocks=whole(tensor.shape), device=tensor.device):
        part = slice(start, start + len(y))
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
    chosen, device = whole(shape) if blocks is None else blocks, device or torch.device("cpu")
    found = pieces(
        bank, check_accumulators(bank, accumulators), ordinal=ordinal, shape=shape, blocks=chosen, device=device
    )
    return torch.cat([torch.empty(0, dtype=torch.int32, device=device), *(y.to(torch.int32) for y in found)])


def rewriter(
    tensors: Sequence[tuple[int, torch.Tensor, torch.Tensor]], *, bank: DirectionBank, exponent: int
) -> Callable[[Array], None]:
    """Return the function that writes w(A) of many tensors of one device, given A, in the quickest way there is.

    Args:
        tensors: (ordinal, w0, where w(A) is written), both contiguous.
        bank: the directions.
        exponent: e of the displacement unit 2^-e.

    Raises:
        ShapeError: if a pair does not fit, or is of another number format.
        RoundError: if torch's arithmetic is not exact.
    """
    way = rebuild
    for _, old, new in tensors:
        prepare_output(old, new)
        way = fastest(old.device)
    if way is rebuild_compiled:
        from fedtune.directions import rebuild_numba

        arrays = [(ordinal, as_array(old.contiguous()), as_array(new)) for ordinal, old, new in tensors]
        return rebuild_numba.rewriter(arrays, bank=bank, exponent=exponent, threads=torch.get_num_threads())

    def rewrite(accumulators: Array) -> None:
        for ordinal, old, new in tensors:
            way(old, accumulators, bank=bank, ordinal=ordinal, exponent=exponent, out=new)

    return rewrite


def fastest(device: torch.device) -> TorchRebuild:
    """Return the quickest way for tensors on a device: numba's on a CPU where it is installed, or torch's."""
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
    """Return a contiguous CPU tensor's memory as an array: what is written to one is seen in the other."""
    plain = tensor.detach()
    if plain.dtype != torch.bfloat16:
        return plain.numpy()
    return plain.view(torch.uint16).numpy().view(DTYPES["bf16"])


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
    for each in (tensor, out):
        if each.dtype not in FORMATS:
            raise ShapeError(f"expected weights in {', '.join(DTYPES)}; got {each.dtype}; cast them")
    check_exact(tensor.device)
    return out


def check_exact(device: torch.device) -> None:
    """Raise RoundError if torch would round products to TF32 or bfloat16, or flush subnormal numbers to zero."""
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
    exact = value_bound(bank, accumulators) < FP32_LIMIT
    sums = torch.from_numpy(accumulators.copy()).to(device)
    length = 128 if device.type == "cpu" else 4096
    if isinstance(bank, Kron) and len(shape) > 1:
        yield from kron(bank, sums, exact=exact, ordinal=ordinal, shape=shape, blocks=blocks, length=length)
        return
    if isinstance(bank, Gaussian):
        for run in runs(blocks, max(1, length // DIRECTIONS)):
            yield gaussian(bank, sums, run, ordinal)[: len(positions(run, shape))]
        return
    dense = bank.vectors if isinstance(bank, Kron) else bank
    if not isinstance(dense, Hadamard):  # a bank without its own way here
        for y in bank.pieces(accumulators, ordinal=ordinal, shape=shape, blocks=blocks):
            yield torch.from_numpy(y).to(device)
        return
    for run in runs(blocks, length):
        linear = hadamard(dense, run, ordinal, device)
        yield apply_linear(linear, sums, exact=exact)[: len(positions(run, shape))]


def apply_linear(linear: Linear, sums: torch.Tensor, *, exact: bool) -> torch.Tensor:
    """Return a linear function of the accumulators, of their high and low parts where it is not exact in one go."""
    if exact:
        return linear(sums.float())
    high = (sums.long() + 2 ** (SPLIT_BITS - 1)) >> SPLIT_BITS  # the low part is at most 2^11 either way
    low = sums - (high << SPLIT_BITS)
    return (linear(high.float()).long() << SPLIT_BITS) + linear(low.float()).long()


def hadamard(bank: Hadamard, run: range, ordinal: int, device: torch.device) -> Linear:
    """Return the function from (K,) to the displacements of a run of blocks, with their signs drawn once."""
    columns = max(WORD, 1 << (bank.size.bit_length() // 2))  # b
    rows = max(1, bank.size // columns)  # a; below K = 32 one row holds several groups
    drawn = words(bank.key, Purpose.DENSE_SIGNS, run, calls=WORDS // 4, ordinal=ordinal, device=device)
    first, second = (
        flips(half.reshape(-1, rows, columns // WORD).transpose(0, 1).contiguous()).view(rows, -1, columns)
        for half in (drawn[:, : WORDS // 2], drawn[:, WORDS // 2 :])
    )  # (a, groups, b) each
    left = torch.from_numpy(walsh(rows)).to(device, torch.float32)
    own = torch.from_numpy(walsh(min(bank.size, columns))).to(device, torch.float32)
    right = torch.block_diag(*[own] * (columns // len(own)))

    def linear(sums: torch.Tensor) -> torch.Tensor:
        tiled = sums.repeat(max(1, columns // bank.size)).view(rows, 1, columns)
        x = (tiled.view(torch.int32) ^ first).view(torch.float32)  # (a, groups, b)
        y = left @ (x.view(-1, columns) @ right).view(rows, -1)  # (a, groups * b)
        y.view(torch.int32).bitwise_xor_(second.view(rows, -1))
        # Adding 0.0 makes +0 of the -0 that a flipped zero is: w0 = -0.0 less it would lose its sign.
        return torch.add(y.view(rows, -1, columns).transpose(0, 1), 0.0).reshape(-1)

    return linear


def kron(
    bank: Kron, sums: torch.Tensor, *, exact: bool, ordinal: int, shape: Sequence[int], blocks: range, length: int
) -> Iterator[torch.Tensor]:
    """Yield the displacements of a matrix, some rows at a time."""
    u, v = (torch.from_numpy(side).to(sums.device, torch.float32) for side in bank.factors(ordinal, shape))
    columns, real = max(1, shape[1]), positions(blocks, shape)
    step = max(1, length * BLOCK // columns)
    for row in range(real.start // columns, -(-real.stop // columns), step):
        some = u[:, row : row + step].T  # (rows, p)

        def linear(part: torch.Tensor, some: torch.Tensor = some) -> torch.Tensor:
            return (some @ (part.view(bank.rank, bank.rank) @ v)).add_(0.0).view(-1)

        first = row * columns
        yield apply_linear(linear, sums, exact=exact)[max(0, real.start - first) : max(0, real.stop - first)]


def gaussian(bank: Gaussian, sums: torch.Tensor, run: range, ordinal: int) -> torch.Tensor:
    """Return the displacements of a run of blocks, int64."""
    y = torch.zeros(len(run) * BLOCK, dtype=torch.int64, device=sums.device)
    used = torch.nonzero(sums).view(-1)
    for some in used.split(DIRECTIONS) if len(used) else ():  # an empty tensor is split into one empty part
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
                for k in some.tolist()
            ]
        )  # (directions, blocks, 2048)
        halves = torch.stack([drawn & 0xFFFF, (drawn >> 16) & 0xFFFF], dim=-1)
        m = popcounts(halves).view(len(some), -1).float() - 8.0

        def linear(part: torch.Tensor, m: torch.Tensor = m) -> torch.Tensor:
            return part @ m

        y += apply_linear(linear, sums[some], exact=False)
    return y


def popcounts(values: torch.Tensor) -> torch.Tensor:
    """Return the number of bits set in each 16-bit value."""
    v = values - ((values >> 1) & 0x5555)
    v = (v & 0x3333) + ((v >> 2) & 0x3333)
    v = (v + (v >> 4)) & 0x0F0F
    return (v + (v >> 8)) & 0x001F


def flips(drawn: torch.Tensor) -> torch.Tensor:
    """Return each bit of the words, lowest first, at the place of a float32's sign: int32 (..., words, 32)."""
    places = torch.arange(WORD - 1, -1, -1, dtype=torch.int32, device=drawn.device)
    return torch.bitwise_left_shift(drawn.unsqueeze(-1), places).bitwise_and_(SIGN_BIT)


def words(
    key: int, purpose: Purpose, run: range, *, calls: int, ordinal: int, device: torch.device, direction: int = 0
) -> torch.Tensor:
    """Return the words that `philox.words` returns, as int32 of the same bits."""
    call = torch.arange(calls, device=device)
    block = torch.arange(run.start, run.stop, device=device)[:, None]
    third, fourth = torch.tensor(purpose | direction << 8, device=device), torch.tensor(ordinal, device=device)
    drawn = torch.broadcast_tensors(*philox((call, block, third, fourth), key))
    return torch.stack(drawn, dim=-1).view(len(run), 4 * calls).to(torch.int32)
