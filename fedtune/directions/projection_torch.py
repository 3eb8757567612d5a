"""Projections with torch, on the device where a gradient lies; on a CPU the transforms are compiled where numba is."""

from __future__ import annotations

import importlib.util

import torch

from fedtune.directions.bank import DirectionBank
from fedtune.directions.blocks import BLOCK, all_blocks, positions, split_runs
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import SIGN_WORDS, Hadamard, walsh
from fedtune.directions.kron import Kron
from fedtune.directions.philox import Purpose
from fedtune.directions.projection import block_rows
from fedtune.directions.rebuild_torch import WORD, as_array, count_bits, sign_flips, words
from fedtune.directions.space import Grouped, group_of, plain_banks

RUN = 128
"""Blocks transformed together on a CPU, whose sums are in float32; the runs' sums are added up in float64."""
RUN_ON_DEVICE = 4096
MAX_DIRECTIONS = 64
"""Directions of the gaussian bank drawn together."""


@torch.no_grad()
def project(bank: DirectionBank, tensor: torch.Tensor, ordinal: int) -> torch.Tensor:
    """Return <tensor, z_k> for every number of the newest bank, float64 (groups x K,), on the tensor's device.

    As `projection.project` up to some millionths of the tensor's norm, by the rounding of sums in float32. The tensor
    may have any number format and layout. With the gaussian bank it costs K random numbers for each weight: minutes
    for a large model.

    Raises:
        ConfigError: if the bank has no directions for this tensor.
    """
    plain, rows = plain_banks(bank)[-1], block_rows(bank)
    if isinstance(plain, Kron) and tensor.dim() > 1:
        sums = project_matrix(plain, tensor, ordinal)
    else:
        dense = plain.vectors if isinstance(plain, Kron) else plain
        sums = project_blocks(dense, tensor, ordinal, rows)
    if not isinstance(bank, Grouped) or bank.groups != "tensor":
        return sums.view(-1)
    numbers = torch.zeros(bank.num_groups, bank.seeds, dtype=torch.float64, device=tensor.device)
    numbers[group_of(bank, ordinal)] = sums[0]
    return numbers.view(-1)


def project_matrix(bank: Kron, matrix: torch.Tensor, ordinal: int) -> torch.Tensor:
    """Return U G V^T of a matrix G, float64 (1, K)."""
    u, v = (
        torch.from_numpy(side).to(matrix.device, torch.float32) for side in bank.factors(ordinal, tuple(matrix.shape))
    )
    sums = torch.zeros(bank.rank, bank.rank, dtype=torch.float64, device=matrix.device)
    # Some rows at a time: a matrix of 16 bits is never there in float32 as a whole.
    step = max(1, RUN_ON_DEVICE * BLOCK // max(1, matrix.shape[1]))
    for start in range(0, len(matrix), step):
        part = matrix[start : start + step].float()
        sums += u[:, start : start + step].double() @ (part @ v.T).double()
    return sums.view(1, -1)


def project_blocks(bank: DirectionBank, tensor: torch.Tensor, ordinal: int, rows: int) -> torch.Tensor:
    """Return the inner products with a bank that is drawn block by block, float64 (rows, K)."""
    flat, device = tensor.detach().reshape(-1), tensor.device
    if isinstance(bank, Hadamard) and device.type == "cpu" and importlib.util.find_spec("numba"):
        from fedtune.directions import projection_numba

        numbers = projection_numba.project_runs(
            bank,
            lambda part: as_array(flat[part.start : part.stop].float().contiguous()),
            ordinal=ordinal,
            shape=tuple(tensor.shape),
            rows=rows,
            threads=torch.get_num_threads(),
        )
        return torch.from_numpy(numbers)
    sums = torch.zeros(rows, bank.size, dtype=torch.float64, device=device)
    length = RUN if device.type == "cpu" else RUN_ON_DEVICE
    length = max(1, length // MAX_DIRECTIONS) if isinstance(bank, Gaussian) else length
    for run in split_runs(all_blocks(tuple(tensor.shape)), length):
        real = positions(run, tuple(tensor.shape))
        part = torch.zeros(len(run) * BLOCK, device=device)
        part[: len(real)] = flat[real.start : real.stop]
        of_blocks = hadamard_products if isinstance(bank, Hadamard) else gaussian_products
        products = of_blocks(bank, part, run, ordinal)  # type: ignore[arg-type]
        for row in range(min(rows, len(run))):
            # Blocks `rows` apart belong to one row, whichever the run starts with.
            sums[(run.start + row) % rows] += products[row::rows].sum(dim=0, dtype=torch.float64)
    return sums


def hadamard_products(bank: Hadamard, part: torch.Tensor, run: range, ordinal: int) -> torch.Tensor:
    """Return the inner products of each block of a run, float32 (blocks, K): the transpose of `hadamard_map`."""
    columns = max(WORD, 1 << (bank.size.bit_length() // 2))  # b
    rows = max(1, bank.size // columns)  # a; below K = 32 one row holds several transforms
    drawn = words(bank.key, Purpose.DENSE_SIGNS, run, calls=SIGN_WORDS // 4, ordinal=ordinal, device=part.device)
    first, second = (sign_flips(half).view(len(run), -1) for half in drawn.split(SIGN_WORDS // 2, dim=1))
    left = torch.from_numpy(walsh(rows)).to(part.device, torch.float32)
    own = torch.from_numpy(walsh(min(bank.size, columns))).to(part.device, torch.float32)
    right = torch.block_diag(*[own] * (columns // len(own)))
    x = (part.view(len(run), -1).view(torch.int32) ^ second).view(torch.float32)  # (blocks, 4096)
    y = left @ (x.view(-1, rows, columns) @ right)  # (transforms, a, b)
    turned: torch.Tensor = (y.reshape(len(run), -1).view(torch.int32) ^ first).view(torch.float32)
    return turned.view(len(run), -1, bank.size).sum(dim=1)


def gaussian_products(bank: Gaussian, part: torch.Tensor, run: range, ordinal: int) -> torch.Tensor:
    """Return the inner products of each block of a run, float32 (blocks, K)."""
    blocks = part.view(len(run), BLOCK, 1)
    products = list[torch.Tensor]()
    for k in range(bank.size):
        drawn = words(
            bank.key, Purpose.GAUSSIAN, run, calls=BLOCK // 8, ordinal=ordinal, device=part.device, direction=k
        )
        halves = torch.stack([drawn & 0xFFFF, (drawn >> 16) & 0xFFFF], dim=-1).view(len(run), 1, BLOCK)
        products.append((count_bits(halves).float() - 8.0) @ blocks)
    return torch.cat(products, dim=2).view(len(run), bank.size).mul_(0.5**bank.halvings)
