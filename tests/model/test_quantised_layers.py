from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ConfigError
from fedtune.model.base import Base
from fedtune.model.quantise import dequantise, quantise
from fedtune.model.quantised_layers import codes_digest, quantisable, quantise_layers, quantised_layers
from fedtune.model.quantised_linear import QuantisedLinear
from fedtune.model.settings import QUANTISED, QuantisedFormat
from fedtune.model.targets import linear_shape

Loader = Callable[..., Base]


def test_only_linear_layers_of_blocks_are_quantised(loaded: Loader) -> None:
    model = loaded("llama").model
    names = quantisable(model)
    leaves = {name.rpartition(".")[2] for name in names}
    assert leaves == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(names) == 7 * model.config.num_hidden_layers
    assert quantisable(model, ["model.layers.0.mlp"]) == [name for name in names if "layers.0.mlp" not in name]


def test_routers_tied_weights_and_the_output_layer_stay(loaded: Loader) -> None:
    model = copy.deepcopy(loaded("llama").model)
    block = model.model.layers[0]
    names = set(quantisable(model))
    block.mlp.shared_expert_gate = nn.Linear(8, 1)
    block.mlp.router = nn.Linear(8, 4)
    block.self_attn.k_proj.weight = block.self_attn.v_proj.weight
    tied = {"model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"}
    assert set(quantisable(model)) == names - tied


def test_a_model_without_such_layers_is_refused(loaded: Loader) -> None:
    model = loaded("llama").model
    expected = r'model\.dtype: expected a base with linear layers in numbered blocks; got none in a llama; set .*16"'
    with pytest.raises(ConfigError, match=expected):
        quantisable(model, ["model"])


@pytest.mark.parametrize("kind", QUANTISED)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_quantised_model_gives_what_its_values_give(name: str, kind: QuantisedFormat, loaded: Loader) -> None:
    """Also where the checkpoint holds weights as (in, out): the blocks run along the inputs there too."""
    task = "classification" if name == "bert" else "causal"
    base = loaded(name, targets=["all-linear"], task=task, labels=("a", "b") if name == "bert" else ())
    ours, theirs = copy.deepcopy(base.model), copy.deepcopy(base.model)
    names = quantisable(ours)
    for place in names:
        module = theirs.get_submodule(place)
        turned = isinstance(module, Conv1D)
        values = dequantise(quantise(module.weight.T if turned else module.weight, kind), torch.float32)
        module.weight.data.copy_(values.T if turned else values)
    quantise_layers(ours, names, kind)
    assert set(quantised_layers(ours)) == set(names)
    assert all(linear_shape(ours.get_submodule(n)) == linear_shape(theirs.get_submodule(n)) for n in names)
    ids = torch.arange(3, 19)[None]
    with torch.inference_mode():
        # The matrix lies in memory as (out, in) there: the sums of a product may be rounded otherwise.
        rtol, atol = (1e-4, 1e-5) if name == "gpt2" else (0.0, 0.0)
        torch.testing.assert_close(ours(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=rtol, atol=atol)


def test_a_bias_stays_the_parameter_that_it_was(loaded: Loader) -> None:
    model = copy.deepcopy(loaded("gpt2", targets=["c_attn"]).model)
    bias = model.transformer.h[0].attn.c_attn.bias
    quantise_layers(model, quantisable(model), "nf4")
    assert model.transformer.h[0].attn.c_attn.bias is bias
    assert "transformer.h.0.attn.c_attn.bias" in dict(model.named_parameters())


def test_the_digest_of_codes_tells_formats_and_numbers_apart(loaded: Loader) -> None:
    model = loaded("llama").model
    assert codes_digest(model) == b""
    ours, other, format_ = (copy.deepcopy(model) for _ in range(3))
    quantise_layers(ours, quantisable(ours), "nf4")
    quantise_layers(format_, quantisable(format_), "int8")
    quantise_layers(other, quantisable(other), "nf4")
    assert codes_digest(ours) == codes_digest(other) != codes_digest(format_)
    layer = other.get_submodule(quantisable(model)[0])
    assert isinstance(layer, QuantisedLinear)
    layer.codes[0, 0] += 1
    assert codes_digest(ours) != codes_digest(other)
