from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ShapeError
from fedtune.lora.adapter import Factors, delta
from fedtune.model.frozen import (
    beside,
    change_weight,
    check_dense,
    is_changed,
    is_exact,
    is_slight,
    own_weight,
    put,
    read_weights,
    restore,
)
from fedtune.tensors import Array


def factors(m: int, n: int, rank: int, seed: int = 0) -> Factors:
    rng = np.random.default_rng(seed)
    return Factors(a=rng.normal(size=(rank, n)).astype(np.float32), b=rng.normal(size=(m, rank)).astype(np.float32))


def layer_of(m: int, n: int, *, transposed: bool = False) -> Any:
    return (Conv1D(m, n) if transposed else nn.Linear(n, m)).requires_grad_(False)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 4), st.booleans(), st.booleans())
def test_a_changed_weight_is_the_sum_in_float64(m: int, n: int, rank: int, dense: bool, transposed: bool) -> None:
    layer, low = layer_of(m, n, transposed=transposed), factors(m, n, rank)
    own = layer.weight.detach().clone()
    change: Factors | Array = delta(low).astype(np.float32) if dense else low
    changed = change_weight(layer, change, None)
    expected = torch.from_numpy(delta(low)).T if transposed else torch.from_numpy(delta(low))
    torch.testing.assert_close(changed.weight.double(), own.double() + expected, atol=2e-6, rtol=1e-6)
    assert torch.equal(layer.weight, own)
    assert not changed.weight.requires_grad


def test_a_dense_change_is_rounded_once() -> None:
    layer = layer_of(2, 2)
    layer.weight.fill_(1.0)
    change = np.full((2, 2), 2.0**-24, np.float32)  # half of the last digit of 1, which goes to the even one
    assert torch.equal(change_weight(layer, change, None).weight, torch.ones(2, 2))
    assert torch.equal(change_weight(layer, 3 * change, None).weight, torch.full((2, 2), 1 + 2.0**-22))


def test_the_same_change_is_not_added_again_and_another_is_written_over_it() -> None:
    layer, low = layer_of(4, 3), factors(4, 3, 2)
    first = change_weight(layer, low, None)
    assert change_weight(layer, Factors(low.a.copy(), low.b.copy()), first) is first
    second = change_weight(layer, factors(4, 3, 2, seed=1), first)
    assert second is not first
    assert second.weight.data_ptr() == first.weight.data_ptr()
    other = layer_of(4, 3)  # another layer's weight, such as that of a pruned copy
    assert change_weight(other, factors(4, 3, 2, seed=1), second) is not second
    assert change_weight(layer_of(5, 3), factors(5, 3, 2), second).weight.shape == (5, 3)


def test_a_change_is_added_again_to_a_weight_that_was_written_to_or_exchanged() -> None:
    """Both leave the parameter the object that it was; a base rebuilt from seeds is exchanged."""
    layer, low = layer_of(4, 3), factors(4, 3, 2)
    first = change_weight(layer, low, None)
    with torch.no_grad():
        layer.weight.mul_(2.0)
    second = change_weight(layer, low, first)
    assert second is not first
    layer.weight.data = 2.0 * layer.weight.data
    third = change_weight(layer, low, second)
    torch.testing.assert_close(third.weight, layer.weight + torch.from_numpy(delta(low)).float())


def test_a_dense_change_is_never_taken_for_an_earlier_one() -> None:
    """It is not held on to, so it cannot be compared."""
    layer, change = layer_of(4, 3), np.ones((4, 3), np.float32)
    first = change_weight(layer, change, None)
    assert first.change is None
    assert change_weight(layer, change, first) is not first


def test_a_layer_reads_a_changed_weight_for_a_while() -> None:
    layer = layer_of(4, 3)
    own, changed = layer.weight, change_weight(layer, factors(4, 3, 2), None)
    assert not is_changed(layer)
    assert own_weight(layer) is own
    before = read_weights(layer)
    put(layer, changed)
    assert layer.weight is changed.weight
    assert is_changed(layer)
    assert own_weight(layer) is own
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    inner = read_weights(layer)
    put(layer, change_weight(layer, factors(4, 3, 1), None))
    restore(layer, inner)
    assert layer.weight is changed.weight
    assert own_weight(layer) is own
    restore(layer, before)
    assert layer.weight is own
    assert not is_changed(layer)
    # As where Ctrl-C comes before `put`.
    restore(layer, before)
    assert layer.weight is own


def test_16_bits_autocast_and_layers_of_other_arithmetic_take_no_change_into_their_weight() -> None:
    class Packed(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    assert is_exact(nn.Linear(2, 2), half=False)
    assert is_exact(Conv1D(2, 2), half=False)
    assert is_exact(nn.Linear(2, 2).double(), half=False)
    assert not is_exact(nn.Linear(2, 2), half=True)
    assert not is_exact(nn.Linear(2, 2).bfloat16(), half=False)
    assert not is_exact(nn.Linear(2, 2).half(), half=False)
    assert not is_exact(Packed(2, 2), half=False)


def test_beside_a_weight_factors_stay_factors_until_they_cost_half_a_layer() -> None:
    cpu = torch.device("cpu")
    assert [part.shape for part in beside(factors(8, 8, 1), cpu)] == [(1, 8), (8, 1)]
    low = factors(8, 8, 2)  # 2 * 2 * 16 = 8 * 8
    [dense] = beside(low, cpu)
    assert dense.dtype == torch.bfloat16
    np.testing.assert_allclose(dense.float().numpy(), delta(low), rtol=2**-8, atol=1e-6)
    [sent] = beside(np.full((2, 3), 1e-9, np.float32), cpu)  # in float16 it would be zero
    assert float(sent[0, 0]) == pytest.approx(1e-9, rel=2**-8)


def test_factors_of_a_small_rank_are_slight_and_a_dense_change_never_is() -> None:
    assert is_slight(factors(128, 128, 1))  # 64 * 1 * 256 = 128 * 128
    assert not is_slight(factors(128, 128, 2))
    assert not is_slight(factors(128, 127, 1))
    assert not is_slight(np.zeros((128, 128), np.float32))


def test_a_dense_change_of_another_number_of_axes_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"x\.w: expected \(out, in\); got \(2, 2, 2\)"):
        check_dense("x", np.zeros((2, 2, 2), np.float32))
