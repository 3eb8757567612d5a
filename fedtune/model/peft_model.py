"""A stock PEFT model over the base, for a training that is not fedtune's: attached for a while, read, and taken off."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from torch.nn.functional import linear

from fedtune.errors import ClientError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.model.base import Base, to_numpy, to_torch
from fedtune.model.frozen import FrozenChange, beside
from fedtune.model.lora import check_shapes, nonzero
from fedtune.model.lora_layer import FrozenParts
from fedtune.model.torch_seed import torch_seed

ADAPTER = "default"
"""PEFT's own name for the adapter of a model that has one."""
WHAT = "its trainer"
"""In messages."""


@contextmanager
def with_peft_model(
    base: Base,
    local: Adapter,
    *,
    scale: float,
    frozen: FrozenChange | None = None,
    dropout: float = 0.0,
    train: str = "ab",
    key: int = 0,
) -> Iterator[PeftModel]:
    """Give a `peft.PeftModel` on the base whose adapter has these factors; afterwards the base's modules are as before.

    The frozen change is added by hooks on the layers beneath the adapter. So it is no parameter: a trainer neither
    trains, saves nor prepares it, and where PEFT disables its adapter the base alone answers, as DPO's reference needs.

    Args:
        base: the base; only its numbers are not restored, see `Base.checksums`.
        local: trainable adapter, its factors as they are trained (b without the scale).
        scale: the adapter's alpha / rank.
        frozen: a change of scale 1 that takes part in the forward pass and gets no gradient.
        dropout: on the adapter's input.
        train: factors that get gradients, `ab` or `b`.
        key: of what PEFT draws for the factors, before they get their own values.

    Raises:
        ShapeError: if a module is not in the base, or has another shape there.
    """
    frozen, local = nonzero(frozen or {}), nonzero(local)
    check_shapes(base, [frozen, local], {})
    with restored_modules(base.model):
        layers = {name: base.model.get_submodule(name) for name in frozen}
        base.model.requires_grad_(False)
        # PEFT draws from torch's global generator, and reads names of transformers that are to go.
        with torch_seed(key, base.device), warnings.catch_warnings(action="ignore", category=FutureWarning):
            model = get_peft_model(base.model, config_of(base, local, scale=scale, dropout=dropout))
        write_factors(model, local, scale=scale)
        for layer in lora_layers(model).values():
            layer.lora_A[ADAPTER].requires_grad_("a" in train)
        wrapped = dict(base.model.named_modules())
        for name, change in frozen.items():
            adapted = wrapped.get(name)
            add_beside(layers[name], exact_parts(change, layers[name], base.device), adapted)
        model.train()
        yield model


def config_of(base: Base, local: Adapter, *, scale: float, dropout: float) -> LoraConfig:
    """Return PEFT's configuration of an adapter; a checkpoint that the trainer writes loads with it."""
    ranks = {name: factors.rank for name, factors in sorted(local.items())}
    largest = max(ranks.values())
    fewer = {name: rank for name, rank in ranks.items() if rank != largest}
    # Patterns are regular expressions behind any prefix. Both have the same modules: alpha is a multiple of each rank.
    return LoraConfig(
        r=largest,
        lora_alpha=whole(scale * largest),
        rank_pattern={re.escape(name): rank for name, rank in fewer.items()},
        alpha_pattern={re.escape(name): whole(scale * rank) for name, rank in fewer.items()},
        target_modules=sorted(ranks),
        lora_dropout=dropout,
        bias="none",
        fan_in_fan_out=base.transposed,
        # As a classifier PEFT would train a copy of the head, where the head itself is trained in full.
        task_type=None if base.task == "classification" else "CAUSAL_LM",
    )


def whole(alpha: float) -> Any:
    """Return alpha as PEFT's files have it, a whole number where it is one."""
    return int(alpha) if alpha == int(alpha) else alpha


def write_factors(model: nn.Module, local: Adapter, *, scale: float) -> None:
    """Write an adapter's values into the layers of a PEFT model, in place."""
    layers = lora_layers(model)
    with torch.no_grad():
        for name, factors in local.items():
            layer = layers[name]
            layer.lora_A[ADAPTER].weight.copy_(torch.from_numpy(factors.a))
            layer.lora_B[ADAPTER].weight.copy_(torch.from_numpy(factors.b))
            # Not alpha / rank again, which may round to another number.
            layer.scaling[ADAPTER] = scale


def lora_layers(model: nn.Module) -> Mapping[str, Any]:
    """Return the LoRA layers of a PEFT model by the names of the base's layers beneath them."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return {name: module for name, module in inner.named_modules() if isinstance(module, LoraLayer)}


def unwrap(model: Any) -> nn.Module | None:
    """Return the model inside wrappers such as DistributedDataParallel or torch.compile; None of what is no model."""
    while isinstance(model, nn.Module) and not isinstance(model, PeftModel):
        inner = getattr(model, "module", None) or getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            break
        model = inner
    return model if isinstance(model, nn.Module) else None


def read_factors(model: nn.Module, asked: Adapter, *, scale: float, client: str) -> Adapter:
    """Return the trained factors of a PEFT model, b for the asked scale.

    Args:
        model: with the adapter.
        asked: the adapter as it was before the training, whose layers and ranks it must have.
        scale: of the adapter as it was asked for; another one is folded into b.
        client: for messages.

    Raises:
        ClientError: if there is no adapter, or one of another kind, of other layers or ranks, or that is not finite.
    """
    layers, asked = lora_layers(model), nonzero(asked)
    again = "train the adapter of the model that the order brings, and leave its shape"
    if not layers:
        raise ClientError(f"{client}: expected the trained adapter of {WHAT}; got a model without one; {again}")
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            got = f"a copy of {name.rpartition('base_model.model.')[2]} beside it, which would be lost"
            raise ClientError(f"{client}: expected an adapter of factors alone from {WHAT}; got {got}; {again}")
    if layers.keys() != asked.keys():
        other = sorted(layers.keys() ^ asked.keys())[0]
        got = f"{len(layers)} with {other}" if other in layers else f"{len(layers)} without {other}"
        raise ClientError(f"{client}: expected an adapter of {len(asked)} layers from {WHAT}; got {got}; {again}")
    return {name: read_layer(name, layers[name], asked[name], scale, client) for name in asked}


def read_layer(name: str, layer: Any, asked: Factors, scale: float, client: str) -> Factors:
    """Return the trained factors of one layer; see `read_factors`."""
    active = [adapter for adapter in layer.active_adapters if adapter in layer.lora_A]
    if len(active) != 1 or (kind := variant_of(layer, active[0])):
        got = f"{len(active)} adapters" if len(active) != 1 else kind
        raise ClientError(f"{client}: expected one plain LoRA adapter at {name} from {WHAT}; got {got}")
    [adapter] = active
    a, b = to_numpy(layer.lora_A[adapter].weight), to_numpy(layer.lora_B[adapter].weight)
    if a.shape[0] != asked.rank:
        raise ClientError(f"{client}: expected rank {asked.rank} at {name} from {WHAT}, as asked; got {a.shape[0]}")
    own = layer.scaling[adapter]
    factors = Factors(a=a, b=b if own == scale else b * (own / scale))
    for side, array in (("A", factors.a), ("B", factors.b)):
        if not bool((abs(array) < float("inf")).all()):
            hint = "lower its learning rate, or train in another number format"
            raise ClientError(f"{client}: expected finite factors from {WHAT}; got others in {side} of {name}; {hint}")
    return factors


def variant_of(layer: Any, adapter: str) -> str:
    """Return what a LoRA layer trains beside its two factors, or in place of them; empty for plain LoRA."""
    if layer.use_dora.get(adapter, False):
        return "DoRA"
    if (variant := layer.lora_variant.get(adapter)) is not None:
        return type(variant).__name__
    return "one with a bias" if layer.lora_B[adapter].bias is not None else ""


def exact_parts(change: Any, layer: nn.Module, device: torch.device) -> FrozenParts:
    """Return a frozen change as matrices to multiply by beside a layer: of a base in 32 bits, in 32 bits as well."""
    weight = layer._parameters.get("weight")
    if weight is None or weight.dtype not in (torch.float32, torch.float64):
        return beside(change, device)
    if not isinstance(change, Factors):
        return (to_torch(change, device),)
    (m, n), rank = change.shape, change.rank
    a, b = to_torch(change.a, device), to_torch(change.b, device)
    return (a, b) if rank * (m + n) < m * n else (b @ a,)


def add_beside(layer: nn.Module, parts: FrozenParts, adapted: Any) -> None:
    """Let a layer give its output plus a frozen change of it; the caller restores its hooks.

    `adapted` is the LoRA layer around it: where that is disabled, or is not this layer's, the change is so too.
    """
    around = adapted if isinstance(adapted, LoraLayer) else None

    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
        if around is not None and around.disable_adapters:
            return None
        change = inputs[0].to(parts[0].dtype)
        for matrix in parts:
            change = linear(change, matrix)
        return (output + change).to(output.dtype)

    layer.register_forward_hook(add)


@contextmanager
def restored_modules(model: Any) -> Iterator[None]:
    """Put back, after the block, all that a model's modules consist of: layers, hooks, modes, attributes, its config.

    Trainers wrap layers, patch `forward`, switch on checkpointing and leave hooks behind: the next client of this base
    must find none of that. The numbers of buffers are put back too; those of parameters are not copied.
    """
    modules = list(model.modules())
    before = [{key: (value, content(value)) for key, value in vars(module).items()} for module in modules]
    config = dict(vars(model.config)) if hasattr(model, "config") else {}
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]  # positions and the like: some kB
    try:
        yield
    finally:
        for module, attributes in zip(modules, before, strict=True):
            own = vars(module)
            own.clear()
            for key, (value, copied) in attributes.items():
                if copied is not None:  # in the same mapping, which handles of hooks refer to
                    value.clear()
                    value.update(copied)
                own[key] = value
        if config:
            vars(model.config).clear()
            vars(model.config).update(config)
        for parameter, required in gradients:
            parameter.requires_grad_(required)
            parameter.grad = None
        for buffer, numbers in buffers:
            buffer.data = numbers


def content(value: Any) -> Any:
    """Return a copy of a mapping or set; None of anything else."""
    return value.copy() if isinstance(value, dict | set) else None
