from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.model.lora_layer import LoraLayer, Trainable

A, B = torch.tensor([[1.0, 2.0, 0.0]]), torch.tensor([[1.0], [-1.0]])  # rank 1, three inputs, two outputs
X = torch.tensor([[1.0, 1.0, 5.0]])


def trainable(scale: float = 2.0, dropout: float = 0.0) -> Trainable:
    return Trainable(nn.Parameter(A.clone()), nn.Parameter(B.clone()), scale, dropout)


def linear(weight: float = 1.0) -> nn.Linear:
    layer = nn.Linear(3, 2, bias=False)
    layer.weight.data.fill_(weight)
    return layer


def test_one_row_by_hand() -> None:
    """W x = 7, a x = 3, times 2 and b: 7 + 6 and 7 - 6."""
    assert LoraLayer(linear(), trainable())(X).tolist() == [[13.0, 1.0]]


def test_frozen_parts_by_hand_with_and_without_a_trained_adapter() -> None:
    dense = torch.tensor([[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert LoraLayer(linear(), None, (dense,))(X).tolist() == [[12.0, 8.0]]
    assert LoraLayer(linear(), None, (A, B))(X).tolist() == [[10.0, 4.0]]
    assert LoraLayer(linear(), trainable(), (A, B))(X).tolist() == [[16.0, -2.0]]


def test_it_shows_the_weight_bias_and_sizes_of_the_layer_beneath() -> None:
    for layer in (nn.Linear(3, 2), Conv1D(2, 3)):
        wrapped = LoraLayer(layer, trainable())
        assert wrapped.weight is layer.weight
        assert wrapped.bias is layer.bias
        assert (wrapped.out_features, wrapped.in_features) == (2, 3)
    assert {name for name, _ in wrapped.named_parameters()} == {"a", "b", "base_layer.weight", "base_layer.bias"}


def test_dropout_is_off_until_it_is_asked_for_and_spares_the_layer_beneath() -> None:
    layer = LoraLayer(linear(), trainable(dropout=0.9))
    assert torch.equal(layer(X), torch.tensor([[13.0, 1.0]]))
    layer.training = True
    outputs = torch.stack([layer(X) for _ in range(50)])
    assert len(outputs.unique(dim=0)) > 1
    assert torch.equal(outputs.sum(dim=-1), torch.full((50, 1), 14.0))  # what is dropped cancels in b: 2 W x stays
    layer.eval()
    assert torch.equal(layer(X), torch.tensor([[13.0, 1.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_factors_are_float32_and_the_sum_is_rounded_once(dtype: torch.dtype) -> None:
    layer = LoraLayer(linear(256.0).to(dtype), trainable(scale=0.25), (A, B))
    output = layer(X.to(dtype))
    assert output.dtype == dtype
    # 1792 + 3 + 0.75: two roundings in bfloat16, to steps of 8, would both go to 1792
    exact = torch.tensor([[1792 + 3.75, 1792 - 3.75]]).to(dtype)
    assert torch.equal(output, exact)


def test_gradients_reach_the_factors_alone() -> None:
    layer = LoraLayer(linear().requires_grad_(False), trainable(), (A, B))
    layer(X).sum().backward()
    assert layer.a is not None
    assert layer.b is not None
    assert layer.b.grad is not None
    assert layer.b.grad.tolist() == [[6.0], [6.0]]
    assert layer.base_layer.weight.grad is None
