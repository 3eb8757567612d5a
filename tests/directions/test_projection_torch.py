from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from fedtune.directions import projection_torch
from fedtune.directions.bank import DirectionBank
from fedtune.directions.hadamard import Hadamard
from fedtune.directions.kron import Kron
from fedtune.directions.projection import project as reference
from fedtune.directions.projection_torch import project
from fedtune.directions.space import directions
from tests.directions.test_projection import EVERY, LABELS
from tests.directions.vectors import SEED, SHAPES, weights


@pytest.fixture
def no_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def check(bank: DirectionBank, tensor: torch.Tensor, values: np.ndarray) -> None:
    expected = reference(bank, values, 9, values.shape)
    found = project(bank, tensor, 9)
    assert (found.dtype, found.shape) == (torch.float64, expected.shape)
    # Of the norm: an inner product with signs may cancel to any small number.
    norm = float(np.linalg.norm(values.astype(np.float64)))
    precision = 1e-6 if bank.name == "hadamard" else 1e-5
    np.testing.assert_allclose(found.cpu().numpy(), expected, rtol=0, atol=precision * norm)


@pytest.mark.parametrize("bank", EVERY, ids=LABELS)
def test_slopes_are_those_of_the_reference(bank: DirectionBank, no_numba: None) -> None:
    for shape in SHAPES:
        values = weights(shape, key=4)
        check(bank, torch.from_numpy(values), values)


@pytest.mark.parametrize("bank", [Hadamard(256, SEED), Kron(16, SEED)], ids=lambda bank: bank.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_gradient_of_another_format_or_layout_is_projected_as_its_values_are(
    bank: DirectionBank, dtype: torch.dtype, no_numba: None
) -> None:
    tensor = torch.from_numpy(weights((70, 130), key=5)).to(dtype)
    check(bank, tensor.t(), tensor.t().double().contiguous().numpy())
    check(bank, tensor[::2, 3:], tensor[::2, 3:].double().numpy())


def test_runs_of_blocks_and_rows_of_a_matrix_add_up(monkeypatch: pytest.MonkeyPatch, no_numba: None) -> None:
    for name in ("RUN", "RUN_ON_DEVICE"):
        monkeypatch.setattr(projection_torch, name, 3)
    values = weights((9, 8000), key=6)
    for bank in (
        directions("hadamard", 32, [SEED], 2),
        directions("hadamard", 32, [SEED], 8),
        directions("gaussian", 2, [SEED], 4),
        Kron(16, SEED),
    ):
        check(bank, torch.from_numpy(values), values)


def test_a_gradient_that_is_still_part_of_a_graph_is_left_alone(no_numba: None) -> None:
    weight = torch.ones(40, requires_grad=True)
    found = project(Hadamard(8, SEED), weight * 2, 1)
    assert not found.requires_grad


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bank", EVERY, ids=LABELS)
def test_a_gpu_gives_the_slopes_of_the_reference(bank: DirectionBank) -> None:
    for shape in SHAPES:
        values = weights(shape, key=4)
        there = torch.from_numpy(values).to("cuda")
        assert project(bank, there, 9).device == there.device
        check(bank, there, values)
