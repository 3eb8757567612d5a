from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from fedtune.directions import moves_torch, rebuild_torch
from fedtune.directions.bank import DirectionBank, perturb
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.moves_torch import mover, stored_bytes
from fedtune.directions.rebuild_numpy import rebuild as reference
from fedtune.directions.rebuild_torch import as_array
from fedtune.directions.space import directions
from fedtune.errors import RoundError, ShapeError
from tests.directions.vectors import SEED, accumulators, sha

WAYS = ("numba", "torch")
FORMATS = (torch.float32, torch.bfloat16, torch.float16)
EXPONENT = 24
Trios = list[tuple[int, torch.Tensor, torch.Tensor]]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def torch_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without numba, or on a GPU."""
    monkeypatch.setattr(moves_torch, "fastest", lambda device: rebuild_torch.rebuild)
    monkeypatch.setitem(moves_torch.RUN, "cpu", 3)  # several runs, the last one not whole


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    """By numba where it is installed, and by torch alone."""
    if request.param == "numba":
        pytest.importorskip("numba")
    else:
        request.getfixturevalue("torch_alone")
    return str(request.param)


def trios(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Trios:
    draw = torch.Generator().manual_seed(SEED)
    tensors = []
    for ordinal, shape in {2: (1,), 5: (17, 241), 9: (5, 3300), 12: (0, 4)}.items():
        old = (torch.randn(shape, generator=draw) * 0.02).to(device, dtype)
        tensors.append((ordinal, old, torch.full_like(old, 7)))
    return tensors


def check_walk(bank: DirectionBank, tensors: Trios) -> None:
    """Hold what is written on a walk of several moves against the numpy reference at the same accumulators."""
    sums, last = accumulators(bank, most=3000), bank.seeds - 1
    move = mover(tensors, sums, bank=bank, exponent=EXPONENT)
    walk = [
        ([], (0, 0)),
        ([], (last, -33_554)),
        ([(last, 16)], (last // 2, 33_554)),
        ([(last // 3, -2032), (0, 1), (last // 3, 5)], (0, 0)),
    ]
    for moves, beside in walk:
        move(moves, beside)
        for step in moves:
            sums = perturb(bank, sums, *step)
        for ordinal, old, new in tensors:
            there = perturb(bank, sums, *beside)
            expected = reference(as_array(old.cpu()), there, bank=bank, ordinal=ordinal, exponent=EXPONENT)
            assert sha(as_array(new.cpu())) == sha(expected), (bank, old.shape, moves, beside)


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_every_format_gives_the_bits_of_the_reference(dtype: torch.dtype, way: str) -> None:
    check_walk(Hadamard(16, SEED), trios(dtype))


@pytest.mark.parametrize("size", [1, 2, 8, 32, 64, 4096])
def test_every_move_of_the_hadamard_bank_gives_the_bits_of_the_reference(size: int, torch_alone: None) -> None:
    check_walk(Hadamard(size, SEED), trios())


def test_every_move_of_the_gaussian_bank_gives_the_bits_of_the_reference(way: str) -> None:
    check_walk(Gaussian(16, SEED), trios())


@pytest.mark.parametrize(
    "bank",
    [
        directions("hadamard", 16, (SEED, SEED + 1), 4),
        directions("hadamard", 16, (SEED,), "tensor", (2, 5, 9, 12)),
        directions("gaussian", 8, (SEED, SEED + 1), 2),
    ],
    ids=["banks and groups", "a group for each tensor", "gaussian"],
)
def test_a_move_is_along_all_groups_of_the_newest_bank(bank: DirectionBank, way: str) -> None:
    check_walk(bank, trios())


def test_displacements_beyond_24_bits_are_rounded_like_the_reference_s(way: str) -> None:
    bank, sums = Hadamard(16, SEED), np.full(16, 2**26, np.int32)
    [_, _, (ordinal, old, new), _] = tensors = trios()
    mover(tensors, sums, bank=bank, exponent=EXPONENT)([(3, 2**25 + 1)], (9, -(2**24) - 3))
    there = perturb(bank, perturb(bank, sums, 3, 2**25 + 1), 9, -(2**24) - 3)
    assert sha(as_array(new)) == sha(reference(as_array(old), there, bank=bank, ordinal=ordinal, exponent=EXPONENT))


@pytest.mark.parametrize("bank", [Hadamard(16, SEED), Gaussian(16, SEED)], ids=lambda bank: bank.name)
def test_what_is_stored_takes_the_memory_that_was_said(bank: Hadamard | Gaussian, way: str) -> None:
    tensors, sums = trios(), np.zeros(16, np.int32)
    said = stored_bytes(bank, [old.numel() for _, old, _ in tensors])
    if way == "numba":
        from fedtune.directions import moves_numba

        taken = 0
        for ordinal, old, new in tensors:
            y = np.zeros(-(-old.numel() // 4096) * 4096, np.int32)
            part = moves_numba.store(bank, ordinal, as_array(old), as_array(new), y)
            taken += part.y.nbytes + part.signs.nbytes * isinstance(bank, Hadamard)
        assert taken == said
        return
    parts = [moves_torch.store(bank, bank, sums, *tensor) for tensor in tensors]
    assert sum(4 * part.y.numel() + 4 * part.signs.numel() for part in parts) <= (said or 0)


def test_a_bank_without_stored_displacements_is_rebuilt() -> None:
    assert stored_bytes(Kron(16, SEED), [4096]) is None
    assert stored_bytes(Hadamard(16, SEED), [4096, 1]) == 2 * 4096 * 4.25
    assert stored_bytes(Gaussian(16, SEED), [4097]) == 2 * 4096 * 4


def test_what_does_not_fit_is_refused_before_anything_is_written(way: str) -> None:
    bank, old = Hadamard(16, SEED), torch.ones(3, 5)
    with pytest.raises(ShapeError, match=r"contiguous result of shape \(3, 5\)"):
        mover([(0, old, torch.ones(5, 3))], np.zeros(16, np.int32), bank=bank, exponent=EXPONENT)
    with pytest.raises(RoundError, match=r"expected sum \|A\| of at most"):
        mover([(0, old, old.clone())], np.full(16, 2**30, np.int32), bank=bank, exponent=EXPONENT)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
@pytest.mark.parametrize(
    "bank",
    [Hadamard(4096, SEED), Hadamard(16, SEED), Gaussian(16, SEED), directions("hadamard", 256, (SEED, 1), 4)],
    ids=lambda bank: f"{bank.name} {bank.size}",
)
def test_a_gpu_gives_the_bits_of_the_reference(bank: DirectionBank, dtype: torch.dtype) -> None:
    check_walk(bank, trios(dtype, "cuda"))
