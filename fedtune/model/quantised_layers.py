"""Which layers of a model are quantised, their exchange in place, and what tells that two machines hold the same."""

from __future__ import annotations

import copy
import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.directions.rebuild_torch import as_array
from fedtune.directions.seed_ledger import TensorEntry, describe_tensor
from fedtune.errors import ConfigError, Fault
from fedtune.model.quantise import quantise
from fedtune.model.quantised_linear import Kernels, QuantisedLinear
from fedtune.model.settings import QuantisedFormat, layer_of
from fedtune.model.targets import READ_PAST

ROUTERS = ("gate", "router")
"""What the names of layers end in that choose experts: a small error there sends a token elsewhere."""


def quantisable(model: Any, leave_out: Collection[str] = ()) -> Sequence[str]:
    """Return the linear layers of a model's blocks that are quantised, by full name in sorted order.

    Not embeddings, norms, the output layer, heads or modules_to_save (`leave_out`), routers, and weights that another
    module or a scan reads past the layer.

    Raises:
        ConfigError: if there are none.
    """
    past = READ_PAST.get(model.config.model_type, ())
    outputs = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    names = [
        name
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or type(module) is Conv1D)
        and layer_of(name) is not None
        and module is not outputs
        and uses[id(module.weight)] == 1
        and not (leaf := name.rpartition(".")[2]).endswith(ROUTERS)
        and leaf not in past
        and not any(name == other or name.startswith(f"{other}.") for other in leave_out)
    ]
    if not names:
        expected, hint = "a base with linear layers in numbered blocks", 'set model.dtype = "bfloat16"'
        raise ConfigError(Fault("model.dtype", expected, f"none in a {model.config.model_type}", hint))
    return sorted(names)


def quantise_layer(
    model: Any, name: str, weight: torch.Tensor, kind: QuantisedFormat, *, kernels: Kernels = "torch"
) -> None:
    """Put a quantised layer into the place of a linear one, in place; the bias stays the object that it is.

    Args:
        model: of transformers.
        name: of the linear layer, whose own weight is not read.
        weight: as the checkpoint lays it out.
        kind: the number format.
        kernels: that read the codes.
    """
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(name)
    transposed, device = isinstance(module, Conv1D), weight.device
    codes = quantise(weight.T if transposed else weight, kind)
    layer = QuantisedLinear(codes, module.bias, transposed=transposed, kernels=kernels)
    # The codes alone: a skeleton's bias is not there yet.
    layer.codes, layer.scales = layer.codes.to(device), layer.scales.to(device)
    setattr(model.get_submodule(parent), leaf, layer.train(module.training))


def quantise_layers(model: Any, names: Sequence[str], kind: QuantisedFormat, *, kernels: Kernels = "torch") -> None:
    """Quantise layers of a loaded model, in place and one after the other."""
    for name in names:
        quantise_layer(model, name, model.get_submodule(name).weight.detach(), kind, kernels=kernels)


def shared_copy(model: Any) -> Any:
    """Return a model of the same tensors, whose layers can be exchanged without the other's."""
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def quantised_layers(model: nn.Module) -> Mapping[str, QuantisedLinear]:
    """Return the quantised layers of a model by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def describe_weight(name: str, weight: torch.Tensor) -> TensorEntry:
    """Return the manifest's entry of a weight before it is quantised."""
    return describe_tensor(name, as_array(weight.detach().cpu().contiguous()))


def codes_digest(model: nn.Module) -> bytes:
    """Return the SHA-256 of the codes and scales of three layers; empty for a model that is not quantised.

    Equal on all machines: it tells whether two clients of the same base and format hold the same numbers.
    """
    layers = sorted(quantised_layers(model).items())
    if not layers:
        return b""
    sha = hashlib.sha256()
    for place in sorted({0, len(layers) // 2, len(layers) - 1}):
        name, layer = layers[place]
        sha.update(f"{name}\0{layer.kind}\0{layer.out_features}\0{layer.in_features}\0".encode())
        for tensor in (layer.codes, layer.scales):
            sha.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.digest()
