"""Virtual tokens as flat tensors: PEFT's layout and back, and the encoder's arithmetic."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedtune.errors import ShapeError
from fedtune.lora.virtual_tokens import (
    are_virtual,
    encode,
    flatten_prefix,
    full_names,
    num_layers,
    own_names,
    unflatten_prefix,
)

SIZES = st.integers(1, 4)


@given(SIZES, SIZES, SIZES, SIZES)
def test_a_prefix_comes_back_from_pefts_layout(count: int, layers: int, heads: int, width: int) -> None:
    flat = np.arange(count * layers * 2 * heads * width, dtype=np.float32).reshape(count, -1)
    own = unflatten_prefix(flat, layers, heads)
    assert num_layers(own) == layers
    assert all(array.shape == (count, heads, width) for array in own.values())
    np.testing.assert_array_equal(flatten_prefix(own), flat)
    assert own_names(full_names(own)).keys() == own.keys()


def test_of_each_layer_the_keys_come_first_and_heads_stay_together() -> None:
    own = unflatten_prefix(np.arange(8, dtype=np.float32)[None], 2, 1)
    assert {name: array.ravel().tolist() for name, array in own.items()} == {
        "layers.0.key": [0, 1],
        "layers.0.value": [2, 3],
        "layers.1.key": [4, 5],
        "layers.1.value": [6, 7],
    }


@pytest.mark.parametrize(("layers", "heads"), [(3, 1), (1, 3), (0, 1), (1, 0), (-1, -1)])
def test_a_prefix_of_another_width_is_refused(layers: int, heads: int) -> None:
    with pytest.raises(ShapeError, match="expected the keys and values"):
        unflatten_prefix(np.zeros((2, 8), np.float32), layers, heads)


def test_an_encoder_gives_what_torchs_layers_give() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
    read = torch.randn(3, 4)
    own = {"embedding": read.numpy(), **{f"encoder.{name}": p.detach().numpy() for name, p in net.named_parameters()}}
    np.testing.assert_allclose(encode(own), net(read).detach().numpy(), atol=1e-6)
    np.testing.assert_array_equal(encode({"embedding": read.numpy()}), read.numpy())  # without one, as they are


def test_factors_are_no_virtual_tokens() -> None:
    assert are_virtual({"virtual_tokens.embedding": 0})
    assert not are_virtual({"model.layers.0.q_proj.a": 0, "score.weight": 0})
    assert not are_virtual({})
