from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtune.directions import rebuild_torch
from fedtune.directions.bank import DirectionBank, displacement
from fedtune.directions.blocks import Groups
from fedtune.directions.gaussian import Gaussian
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.rebuild_numpy import rebuild as reference
from fedtune.directions.rebuild_torch import TorchRebuild, as_array, fastest, rebuild_compiled
from fedtune.directions.space import directions
from fedtune.errors import ConfigError, RoundError, ShapeError
from fedtune.tensors import DTYPES, Array
from tests.directions.vectors import (
    BANKS,
    SEED,
    SPACE_NAMES,
    SPACES,
    TENSORS,
    accumulators,
    check_against_reference,
    check_no_displacement,
    check_spaces,
    check_vectors,
    sha,
    weights,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def as_tensor(array: Array) -> torch.Tensor:
    if array.dtype == DTYPES["bf16"]:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def rebuild(
    tensor: Array,
    accumulators: Array,
    *,
    bank: DirectionBank,
    ordinal: int,
    exponent: int,
    out: Array | None = None,
    way: TorchRebuild = rebuild_torch.rebuild,
    device: torch.device = CPU,
) -> Array:
    there = as_tensor(tensor).to(device)
    return as_array(way(there, accumulators, bank=bank, ordinal=ordinal, exponent=exponent).cpu())


def test_the_expected_weights_are_rebuilt() -> None:
    check_vectors(rebuild)


@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: f"{bank.name}-{bank.size}")
@pytest.mark.parametrize("most", [30, 2**18])
def test_every_size_gives_the_bits_of_the_reference(bank: DirectionBank, most: int) -> None:
    # The larger sums leave the 24 bits that float32 holds.
    most = most if bank.size < 4096 or most < 1000 else 2**15
    check_against_reference(rebuild, bank, most=most, dtypes=("fp32", "bf16"))


@pytest.mark.parametrize("bank", SPACES, ids=SPACE_NAMES)
@pytest.mark.parametrize("most", [30, 2**15])
def test_several_banks_and_groups_give_the_bits_of_the_reference(bank: DirectionBank, most: int) -> None:
    check_spaces(rebuild, bank, most=most, dtypes=("fp32", "fp16", "bf16"))


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.sampled_from([1, 2, 16, 64, 512]),
    groups=st.sampled_from([1, 2, 4, 64, "tensor"]),
    banks=st.integers(1, 3),
    size=st.integers(0, 20_000),
    most=st.sampled_from([5, 2**18]),
    first=st.integers(0, 2),
)
def test_displacements_of_any_banks_and_groups_are_those_of_the_reference(
    seeds: int, groups: Groups, banks: int, size: int, most: int, first: int
) -> None:
    bank = directions("hadamard", seeds, range(7, 7 + banks), groups, TENSORS)
    sums, blocks = accumulators(bank, most=most, key=size), range(first, max(first, -(-size // 4096)))
    y = rebuild_torch.displacement(bank, sums, ordinal=9, shape=(size,), blocks=blocks)
    np.testing.assert_array_equal(y, displacement(bank, sums, ordinal=9, shape=(size,), blocks=blocks))


@pytest.mark.parametrize("size", [2, 16, 32, 64, 128, 512, 2048])
def test_every_size_of_the_pool_gives_the_displacements_of_the_reference(size: int) -> None:
    bank = Hadamard(size, SEED)
    sums = accumulators(bank, most=2**19)
    y = rebuild_torch.displacement(bank, sums, ordinal=3, shape=(11, 900), blocks=range(1, 3))
    np.testing.assert_array_equal(y, displacement(bank, sums, ordinal=3, shape=(11, 900), blocks=range(1, 3)))


@pytest.mark.parametrize("bank", [Hadamard(256, SEED), Kron(256, SEED)], ids=lambda bank: bank.name)
def test_a_large_tensor_is_rebuilt_in_pieces_to_the_same_bits(bank: DirectionBank) -> None:
    base, sums = weights((150, 4100), "bf16"), accumulators(bank, most=2000)
    expected = reference(base, sums, bank=bank, ordinal=2, exponent=22)
    assert sha(rebuild(base, sums, bank=bank, ordinal=2, exponent=22)) == sha(expected)


def test_a_tensor_of_three_dimensions_has_no_kron_directions() -> None:
    with pytest.raises(ConfigError, match="at most two dimensions for 'kron'"):
        rebuild(weights((2, 3, 4)), np.zeros(16, np.int32), bank=Kron(16, SEED), ordinal=0, exponent=9)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_displacement_every_bit_of_the_base_comes_back(dtype: str) -> None:
    check_no_displacement(rebuild, dtype)


def test_a_zero_below_a_flipped_sign_keeps_the_base_as_it_is() -> None:
    bank = Hadamard(2, SEED)
    # x - x is 0 at every second position, and half of these zeros are multiplied by -1.
    y = displacement(bank, np.array([1, 1], np.int32), ordinal=0, shape=(4096,))
    base = np.full(4096, -0.0, np.float32)
    rebuilt = rebuild(base, np.array([1, 1], np.int32), bank=bank, ordinal=0, exponent=9)
    assert np.signbit(rebuilt[y == 0]).all()
    assert (y == 0).sum() > 1000


def test_a_model_is_rewritten_where_it_lies() -> None:
    bank, base = Kron(256, SEED), weights((50, 90), "bf16")
    sums = accumulators(bank, most=2000)
    resident = as_tensor(base.copy())
    for way in (rebuild_torch.rebuild, fastest(CPU)):
        resident.copy_(as_tensor(base))
        assert way(resident, sums, bank=bank, ordinal=4, exponent=20, out=resident) is resident
        assert sha(as_array(resident)) == sha(rebuild(base, sums, bank=bank, ordinal=4, exponent=20))


def test_a_parameter_that_wants_gradients_is_rebuilt_without_them() -> None:
    bank, base = Hadamard(16, SEED), torch.nn.Parameter(torch.ones(3, 5))
    sums = accumulators(bank, most=9)
    rebuilt = rebuild_torch.rebuild(base, sums, bank=bank, ordinal=0, exponent=9, out=base)
    assert rebuilt is base
    assert base.grad is None


def test_an_array_shares_the_memory_of_its_tensor() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        tensor = torch.zeros(3, dtype=dtype)
        as_array(tensor)[1] = 2.0
        assert tensor.tolist() == [0.0, 2.0, 0.0]


@pytest.mark.parametrize("bank", [Hadamard(256, SEED), Gaussian(16, SEED), Kron(256, SEED)], ids=lambda bank: bank.name)
def test_numba_rebuilds_cpu_tensors_to_the_same_bits(bank: DirectionBank) -> None:
    pytest.importorskip("numba")
    assert fastest(CPU) is rebuild_compiled
    base, sums = weights((9, 1000), "bf16"), accumulators(bank, most=2000)
    ours = rebuild(base, sums, bank=bank, ordinal=1, exponent=22)
    theirs = rebuild(base, sums, bank=bank, ordinal=1, exponent=22, way=rebuild_compiled)
    assert sha(ours) == sha(theirs)


def test_without_numba_the_fastest_way_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert fastest(CPU) is rebuild_torch.rebuild
    assert fastest(CUDA) is rebuild_torch.rebuild


def test_rounded_matrix_products_are_refused() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with pytest.raises(RoundError, match="matrix products in full float32; got"):
            rebuild(weights((4,)), np.zeros(1, np.int32), bank=Hadamard(1, SEED), ordinal=0, exponent=9)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_flushed_subnormal_numbers_are_refused() -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("needs a processor that can flush subnormal numbers to zero")
    try:
        with pytest.raises(RoundError, match="expected subnormal numbers"):
            rebuild(weights((4,)), np.zeros(1, np.int32), bank=Hadamard(1, SEED), ordinal=0, exponent=9)
    finally:
        torch.set_flush_denormal(False)


def test_a_result_that_does_not_fit_is_refused() -> None:
    sums, bank = np.zeros(1, np.int32), Hadamard(1, SEED)
    for out in (torch.empty(5), torch.empty(4, 2)[:, 0]):
        with pytest.raises(ShapeError, match="expected a contiguous result"):
            rebuild_torch.rebuild(torch.zeros(4), sums, bank=bank, ordinal=0, exponent=9, out=out)
    with pytest.raises(ShapeError, match=r"expected weights in fp32, fp16, bf16; got torch\.float64"):
        rebuild_torch.rebuild(torch.zeros(4, dtype=torch.float64), sums, bank=bank, ordinal=0, exponent=9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bank", BANKS, ids=lambda bank: f"{bank.name}-{bank.size}")
def test_a_gpu_gives_the_bits_of_the_reference(bank: DirectionBank) -> None:
    on_gpu = partial(rebuild, device=CUDA)
    check_against_reference(on_gpu, bank, most=2**15, dtypes=("fp32", "bf16", "fp16"))
    check_vectors(on_gpu)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bank", SPACES, ids=SPACE_NAMES)
def test_a_gpu_gives_the_bits_of_the_reference_for_several_banks_and_groups(bank: DirectionBank) -> None:
    for most in (30, 2**15):
        check_spaces(partial(rebuild, device=CUDA), bank, most=most, dtypes=("fp32", "bf16", "fp16"))


REWRITTEN = ((1,), (3, 5), (17, 241))
"""One position, part of a block, and one block with a single position behind it."""


@pytest.mark.parametrize("way", ["fastest", "torch"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bank", [Hadamard(256, SEED), Gaussian(16, SEED), Kron(256, SEED)], ids=lambda bank: bank.name)
def test_a_whole_model_is_rewritten_to_the_bits_of_the_reference(
    bank: DirectionBank, dtype: str, threads: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "torch":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    torch.set_num_threads(threads)
    arrays = [weights(shape, dtype, key=place) for place, shape in enumerate(REWRITTEN)]
    copies = [as_tensor(array.copy()) for array in arrays]
    tensors = [
        (place + 3, as_tensor(array), copy) for place, (array, copy) in enumerate(zip(arrays, copies, strict=True))
    ]
    rewrite = rebuild_torch.rewriter(tensors, bank=bank, exponent=24)
    # Each time from w0, never from what was written before.
    for sums in (accumulators(bank, most=3000), accumulators(bank, most=2000, key=1, used=9)):
        rewrite(sums)
        for place, (array, copy) in enumerate(zip(arrays, copies, strict=True)):
            expected = reference(array, sums, bank=bank, ordinal=place + 3, exponent=24)
            assert sha(as_array(copy)) == sha(expected), array.shape


@pytest.mark.parametrize("bank", [Hadamard(256, SEED), Kron(256, SEED), Gaussian(16, SEED)], ids=lambda bank: bank.name)
def test_accumulators_of_zero_are_no_displacement(bank: DirectionBank) -> None:
    base, zeros = weights((17, 241), "bf16"), np.zeros(bank.size, np.int32)
    assert sha(rebuild(base, zeros, bank=bank, ordinal=3, exponent=24)) == sha(base)
    y = rebuild_torch.displacement(bank, zeros, ordinal=3, shape=(17, 241))
    assert y.tolist() == [0] * 4097


def test_a_rewriter_is_numbas_where_it_is_installed() -> None:
    numba_rebuild = pytest.importorskip("fedtune.directions.rebuild_numba")
    base, new = torch.ones(3, 5), torch.zeros(3, 5)
    rewrite = rebuild_torch.rewriter([(0, base, new)], bank=Hadamard(16, SEED), exponent=9)
    assert rewrite.__module__ == numba_rebuild.__name__


@pytest.mark.parametrize("way", ["fastest", "torch"])
def test_a_rewriter_refuses_what_a_rebuild_refuses(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "torch":
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    bank, base = Hadamard(16, SEED), torch.ones(3, 5)
    with pytest.raises(ShapeError, match="contiguous result of shape"):
        rebuild_torch.rewriter([(0, base, torch.ones(5, 3).T)], bank=bank, exponent=9)
    with pytest.raises(ShapeError, match="expected weights in"):
        rebuild_torch.rewriter([(0, base, torch.ones(3, 5, dtype=torch.float64))], bank=bank, exponent=9)
    with pytest.raises(RoundError, match=r"expected sum \|A\| of at most"):
        rebuild_torch.rewriter([(0, base, torch.ones(3, 5))], bank=bank, exponent=9)(np.full(16, 2**30, np.int32))


def test_parameters_are_rewritten_without_gradients() -> None:
    bank, base = Hadamard(16, SEED), torch.ones(3, 5)
    parameter = torch.nn.Parameter(torch.zeros(3, 5))
    sums = accumulators(bank, most=9)
    rebuild_torch.rewriter([(0, base, parameter)], bank=bank, exponent=9)(sums)
    assert parameter.requires_grad
    assert parameter.grad is None
    expected = reference(np.ones((3, 5), np.float32), sums, bank=bank, ordinal=0, exponent=9)
    assert sha(as_array(parameter)) == sha(expected)
