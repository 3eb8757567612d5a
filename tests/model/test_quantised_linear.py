from __future__ import annotations

import gc
import weakref
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from fedtune.errors import ConfigError, ExtraError
from fedtune.model import quantised_linear
from fedtune.model.quantise import QuantisedWeight, dequantise, quantise
from fedtune.model.quantised_linear import QuantisedLinear, choose_kernels
from fedtune.model.settings import QUANTISED, QuantisedFormat
from tests.model.test_quantise import gaussian

CPU = torch.device("cpu")


def pair(kind: QuantisedFormat, *, bias: bool = True) -> tuple[QuantisedLinear, nn.Linear]:
    """Return a quantised layer (24, 172), and the plain one that holds the same values."""
    weight = quantise(gaussian(24, 172, seed=1), kind)
    plain = nn.Linear(172, 24, bias=bias)
    plain.weight = nn.Parameter(dequantise(weight, torch.float32), requires_grad=False)
    return QuantisedLinear(weight, plain.bias), plain.requires_grad_(False)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", QUANTISED)
def test_output_and_gradient_are_those_of_the_values_to_the_last_bit(kind: QuantisedFormat, bias: bool) -> None:
    ours, theirs = pair(kind, bias=bias)
    inputs = [gaussian(3 * 5, 172, seed=2, scale=1.0).view(3, 5, 172).requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((ours, theirs), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    with torch.inference_mode():
        assert torch.equal(ours(inputs[0]), outputs[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_in_the_format_of_the_input(dtype: torch.dtype) -> None:
    ours, theirs = pair("nf4")
    x = gaussian(4, 172, seed=2, scale=1.0).to(dtype)
    assert torch.equal(ours(x), theirs.to(dtype)(x))


def test_autocast_rounds_the_product_and_not_the_gradient() -> None:
    ours, theirs = pair("nf4")
    inputs = [gaussian(4, 172, seed=2, scale=1.0).requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [layer(x) for layer, x in zip((ours, theirs), inputs, strict=True)]
    assert outputs[0].dtype == torch.bfloat16
    assert torch.equal(*outputs)
    for output in outputs:
        output.float().sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert inputs[0].grad.dtype == torch.float32
    assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_no_matrix_is_in_memory_between_forward_and_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices: list[weakref.ref[torch.Tensor]] = []

    def watched(weight: QuantisedWeight, dtype: torch.dtype) -> torch.Tensor:
        matrix = dequantise(weight, dtype)
        matrices.append(weakref.ref(matrix))
        return matrix

    monkeypatch.setattr(quantised_linear, "DEQUANTISE", {"torch": watched})
    ours, _ = pair("nf4")
    output = ours(gaussian(4, 172, seed=2).requires_grad_()).sum()
    gc.collect()
    assert [reference() for reference in matrices] == [None]
    output.backward()
    assert len(matrices) == 2


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(24, 172)), torch.zeros(24, 172)])
def test_nothing_is_merged_into_a_quantised_weight(value: torch.Tensor) -> None:
    ours, _ = pair("nf4")
    before = ours.codes.clone()
    with pytest.raises(ConfigError, match=r"model\.dtype: expected changes beside a quantised base.*--form merged"):
        ours.weight = value  # type: ignore[misc]
    # A copy is all that a layer gives away: what writes in place changes nothing.
    ours.weight.add_(1.0)
    assert torch.equal(ours.codes, before)


def test_a_transposed_layer_shows_its_weight_as_the_checkpoint_does() -> None:
    weight = quantise(gaussian(24, 64), "nf4")
    assert QuantisedLinear(weight, None, transposed=True).weight.shape == (64, 24)
    assert torch.equal(QuantisedLinear(weight, None, transposed=True).weight.T, QuantisedLinear(weight, None).weight)


def test_kernels_that_a_format_or_device_has_not_are_refused() -> None:
    expected = r"model\.kernels: expected auto or torch: .*nf4 on cpu and cuda; got 'bitsandbytes' for {}"
    with pytest.raises(ConfigError, match=expected.format("int8 on cpu")):
        choose_kernels("bitsandbytes", "int8", CPU)
    with pytest.raises(ConfigError, match=expected.format("nf4 on mps")):
        choose_kernels("bitsandbytes", "nf4", torch.device("mps"))
    assert choose_kernels("torch", "nf4", CPU) == choose_kernels("auto", "nf4", CPU) == "torch"
    assert choose_kernels("auto", "int8", torch.device("cuda")) == "torch"


def test_kernels_are_chosen_by_what_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised_linear, "find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r'bitsandbytes; it is not installed; run pip install "fedtune\[quant\]"'):
        choose_kernels("bitsandbytes", "nf4", CPU)
    assert choose_kernels("auto", "nf4", torch.device("cuda")) == "torch"
    monkeypatch.setattr(quantised_linear, "find_spec", lambda name: object())
    assert choose_kernels("bitsandbytes", "nf4", CPU) == "bitsandbytes"
    assert choose_kernels("auto", "nf4", torch.device("cuda")) == "bitsandbytes"


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs the extra quant")
def test_installed_kernels_give_the_same_output_and_gradient() -> None:
    ours, _ = pair("nf4")
    theirs = QuantisedLinear(ours.quantised, ours.bias, kernels="bitsandbytes")
    inputs = [gaussian(4, 172, seed=2, scale=1.0).requires_grad_() for _ in range(2)]
    outputs = [layer(x) for layer, x in zip((ours, theirs), inputs, strict=True)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    assert torch.equal(inputs[0].grad, inputs[1].grad)
