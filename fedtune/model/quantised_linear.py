"""A linear layer whose frozen weight is held in 4 or 8 bits, and read anew for each product forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.functional import linear

from fedtune.errors import ConfigError, ExtraError, Fault
from fedtune.model.quantise import BLOCK, QuantisedWeight, dequantise
from fedtune.model.settings import QuantisedFormat

Kernels = Literal["torch", "bitsandbytes"]
Dequantise = Callable[[QuantisedWeight, torch.dtype], torch.Tensor]


class QuantisedLinear(nn.Module):
    """Gives what a linear layer with the dequantised weight gives, to the last bit, forward and backward.

    The matrix exists only while it is multiplied by: neither is it saved for the backward pass.
    """

    def __init__(
        self,
        weight: QuantisedWeight,
        bias: nn.Parameter | None,
        *,
        transposed: bool = False,
        kernels: Kernels = "torch",
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.kind = weight.kind
        self.transposed = transposed
        """Whether the checkpoint holds the weight as (in, out), as GPT-2's does."""
        self.kernels: Kernels = kernels
        self.codes: torch.Tensor
        self.scales: torch.Tensor
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)
        self.bias = bias

    @property
    def quantised(self) -> QuantisedWeight:
        """The codes and scales."""
        return QuantisedWeight(self.kind, self.codes, self.scales, (self.out_features, self.in_features))

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight (out, in) in a number format, in memory of its own."""
        return DEQUANTISE[self.kernels](self.quantised, dtype)

    @property
    def weight(self) -> torch.Tensor:
        """A copy of the weight in float32 as the checkpoint lays it out, for what reads it past the layer."""
        matrix = self.matrix(torch.float32)
        matrix = matrix.T if self.transposed else matrix
        # transformers draws what lacks this mark: into nothing, but other draws of a new head would follow.
        matrix._is_hf_initialized = True  # type: ignore[attr-defined]
        return matrix

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise merge_error()
        super().__setattr__(name, value)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product for x (..., in), in x's number format or in that of autocast."""
        if torch.is_autocast_enabled(x.device.type):
            # Outside of the function below, so that the gradient is cast back.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            product: torch.Tensor = Product.apply(x, self.bias, self)  # type: ignore[no-untyped-call]
            return product
        return multiply(x, self)

    def extra_repr(self) -> str:
        """Return what a printed model shows of the layer."""
        return f"in_features={self.in_features}, out_features={self.out_features}, kind={self.kind}"


def multiply(x: torch.Tensor, layer: QuantisedLinear) -> torch.Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return linear(x, layer.matrix(x.dtype), bias)


class Product(torch.autograd.Function):
    """A product with a quantised weight whose backward pass reads the codes again, in place of a saved matrix."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: QuantisedLinear) -> torch.Tensor:
        """Return the layer's output; its bias is an argument because it may be trained."""
        ctx.layer = layer
        return multiply(x, layer)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        """Return the gradients of the input and of the bias."""
        [gradient], (of_input, of_bias, _) = gradients, ctx.needs_input_grad
        return (
            gradient @ ctx.layer.matrix(gradient.dtype) if of_input else None,
            gradient.reshape(-1, gradient.shape[-1]).sum(0).to(ctx.layer.bias.dtype) if of_bias else None,
            None,
        )


def merge_error() -> ConfigError:
    """Return the error of writing to a quantised weight."""
    expected = "changes beside a quantised base: merged into it, most of a small change would be rounded away"
    hint = "export the run (fedtune export --form merged): that merges once, into the unquantised checkpoint"
    return ConfigError(Fault("model.dtype", expected, "a change of a quantised weight itself", hint))


def dequantise_by_bitsandbytes(weight: QuantisedWeight, dtype: torch.dtype) -> torch.Tensor:
    """Return what `dequantise` returns, by the kernel of bitsandbytes."""
    (m, n), padded = weight.shape, weight.scales.shape[1] * BLOCK
    op = bitsandbytes_ops().dequantize_4bit
    # In float32 and cast then, as ours: their kernels may cast once more on the way.
    values: torch.Tensor = op(
        weight.codes.view(-1, 1), weight.scales.view(-1), BLOCK, "nf4", [m, padded], torch.float32
    )
    return values.view(m, padded)[:, :n].to(dtype)


DEQUANTISE: Mapping[Kernels, Dequantise] = {"torch": dequantise, "bitsandbytes": dequantise_by_bitsandbytes}


@lru_cache(maxsize=1)
def bitsandbytes_ops() -> Any:
    """Return the operators that bitsandbytes registers with torch; importing it takes seconds.

    Raises:
        ExtraError: if it is not installed.
    """
    check_installed()
    import logging

    # On import it warns of a package of faster products in 16 bits, which are not used here.
    logger = logging.getLogger("bitsandbytes")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes  # noqa: F401  # registers them
    finally:
        logger.setLevel(before)
    return torch.ops.bitsandbytes


def check_installed() -> None:
    """Refuse kernels that are not there.

    Raises:
        ExtraError: naming the extra.
    """
    if find_spec("bitsandbytes") is None:
        raise ExtraError(
            "model.kernels: expected the package bitsandbytes; it is not installed; "
            'run pip install "fedtune[quant]", or leave model.kernels at auto: the values are the same'
        )


def choose_kernels(setting: str, kind: QuantisedFormat, device: torch.device) -> Kernels:
    """Return the kernels for a base: for `auto` bitsandbytes' on CUDA where they are installed, else torch's.

    On a CPU theirs win a tenth of a step and cost seconds of import, so they are only used where they are asked for.

    Raises:
        ConfigError: if bitsandbytes has none for this format or device.
        ExtraError: if it is asked for and not installed.
    """
    if setting == "bitsandbytes":
        if kind != "nf4" or device.type not in ("cpu", "cuda"):
            expected = "auto or torch: bitsandbytes' kernels are used for nf4 on cpu and cuda"
            raise ConfigError(Fault("model.kernels", expected, f"{setting!r} for {kind} on {device.type}"))
        check_installed()
        return "bitsandbytes"
    fast = setting == "auto" and kind == "nf4" and device.type == "cuda" and find_spec("bitsandbytes") is not None
    return "bitsandbytes" if fast else "torch"
