"""Surgery: a model whose blocks hold fewer heads and channels for a while, and its double with gates instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import StaticCache
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ConfigError, Fault, ShapeError
from fedtune.model.base import linear_shape
from fedtune.pruning.structure import (
    FAMILIES,
    Block,
    BlockLayout,
    BlockStructure,
    LayerSlice,
    ModelStructure,
    Side,
    check,
    cuts,
    linear_shapes,
    shapes,
    within,
)


def layout_of(model: Any) -> BlockLayout:
    """Return the blocks of a transformers model as they are now, with prefixes as in `named_modules`.

    Raises:
        ConfigError: for a model whose heads and channels cannot be taken out: another family, fused projections,
            experts, cross attention, quantised or tensor-parallel layers.
    """
    config = model.config
    family = str(getattr(config, "model_type", None))
    if family not in FAMILIES:
        raise unsupported_error(family, "another family")
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise unsupported_error(family, "with cross attention")
    if getattr(model, "hf_quantizer", None) is not None or getattr(config, "quantization_config", None) is not None:
        raise unsupported_error(family, "quantised before it is pruned")
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise unsupported_error(family, "spread over devices by tensor parallelism")
    modules = {name: core(module) for name, module in model.named_modules()}
    first = next(iter(FAMILIES[family]))
    # The block's own name is what is left of its first layer's; a bare model has no prefix before it.
    prefixes = [name.removesuffix(f".{first}") for name in modules if name.endswith(f".{first}")]
    blocks = []
    for prefix in prefixes:
        sizes: dict[Side, int] = {}
        for layer, sides in FAMILIES[family].items():
            module = modules.get(f"{prefix}.{layer}")
            shape = None if module is None else linear_shape(module)
            if shape is None or type(module) not in (nn.Linear, Conv1D):  # a quantised layer would be a subclass
                got = "missing" if module is None else type(module).__name__
                raise unsupported_error(family, f"whose {prefix}.{layer} is {got}")
            sizes |= dict(zip(sides, shape, strict=True))
        size = head_dim(family, modules, prefix)
        heads = sizes["q"] // size
        blocks.append(Block(prefix, heads, sizes["kv"] // size if "kv" in sizes else heads, size, sizes["ff"]))
    if not blocks:
        raise unsupported_error(family, f"without a layer {first}")
    return BlockLayout(family=family, blocks=tuple(blocks), width=int(config.hidden_size))


def unsupported_error(family: str, reason: str) -> ConfigError:
    expected = f"a model of type {', '.join(FAMILIES)}, with plain linear layers for queries, keys, values and channels"
    return ConfigError(Fault("pruning", expected, f"{family!r} ({reason})", "leave pruning out, or use another base"))


def head_dim(family: str, modules: Mapping[str, Any], prefix: str) -> int:
    match family:
        case "gpt2":
            return int(modules[f"{prefix}.attn"].head_dim)
        case "bert" | "roberta":
            return int(modules[f"{prefix}.attention.self"].attention_head_size)
        case _:
            return int(modules[f"{prefix}.self_attn"].head_dim)


def core(module: Any) -> Any:
    """Return the linear layer beneath peft's wrapper, or the module itself."""
    return getattr(module, "base_layer", module)


def widths(family: str, block: Block, kept: BlockStructure) -> Mapping[str, Mapping[str, int]]:
    """Return the attributes of a block's modules that follow from what is kept; its linear layers have their own.

    `scaling` and the sizes of a head are those of the base: heads are taken out whole.
    """
    heads, wide = len(kept.q), len(kept.q) * block.head_dim
    match family:
        case "gpt2":
            return {"attn": {"num_heads": heads, "split_size": wide, "embed_dim": wide}}
        case "bert" | "roberta":
            return {"attention.self": {"num_attention_heads": heads, "all_head_size": wide}}
        case _:
            return {
                "self_attn": {"num_key_value_groups": heads // len(kept.kv)},
                "mlp": {"intermediate_size": len(kept.ff)},
            }


def fit(model: Any, keep: ModelStructure, anatomy: BlockLayout) -> None:
    """Write the attributes that follow from what is kept into a model's blocks, in place."""
    for block, kept in zip(anatomy.blocks, keep.blocks, strict=True):
        for name, values in widths(anatomy.family, block, kept).items():
            module = model.get_submodule(f"{block.prefix}.{name}")
            for attribute, value in values.items():
                setattr(module, attribute, value)


@dataclass(frozen=True)
class Taken:
    """The kept rows and columns of one linear layer, as index tensors; None: all of them."""

    out: torch.Tensor | None
    into: torch.Tensor | None

    def weight(self, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return what takes the kept part of a tensor of the weight's shape; GPT-2's is (in, out)."""
        first, second = (self.into, self.out) if isinstance(module, Conv1D) else (self.out, self.into)
        return lambda tensor: take(take(tensor, 0, first), 1, second)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        return take(tensor, 0, self.out)

    def columns(self, tensor: torch.Tensor) -> torch.Tensor:
        return take(tensor, 1, self.into)


def take(tensor: torch.Tensor, axis: int, at: torch.Tensor | None) -> torch.Tensor:
    """Return a contiguous copy of some of a tensor; the tensor itself where that is all of it."""
    return tensor if at is None or len(at) == tensor.shape[axis] else tensor.index_select(axis, at.to(tensor.device))


def slice_of(cut: LayerSlice) -> Taken:
    return Taken(*(None if part is None else torch.from_numpy(part) for part in (cut.out, cut.into)))


def smaller(parameter: nn.Parameter, part: Callable[[torch.Tensor], torch.Tensor]) -> nn.Parameter:
    """Return a parameter of the part; the same object if the part is the whole."""
    with torch.no_grad():
        data = part(parameter.data)
        if data.shape == parameter.shape:
            return parameter
        found = nn.Parameter(data, requires_grad=parameter.requires_grad)
        if parameter.grad is not None:
            found.grad = part(parameter.grad)
    return found


def set_parameters(module: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    """Give a linear layer other parameters, and the sizes that follow from them."""
    module.weight = weight
    if bias is not None:
        module.bias = bias
    if isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape
    else:
        module.out_features, module.in_features = weight.shape


def cut_linear(module: Any, part: Taken) -> Mapping[nn.Parameter, nn.Parameter]:
    """Take rows and columns out of a linear layer, in place; return (old, new) of the parameters that changed."""
    weight, bias = module.weight, module.bias
    set_parameters(
        module,
        smaller(weight, part.weight(module)),
        None if bias is None else smaller(bias, part.rows),
    )
    pairs = [(weight, module.weight), (bias, module.bias)]
    return {old: new for old, new in pairs if old is not None and old is not new}


@contextmanager
def with_structure(model: Any, keep: ModelStructure, anatomy: BlockLayout) -> Iterator[Any]:
    """Take heads and channels out of a model for the length of the block: smaller matrices, no masks.

    Afterwards every parameter is the object it was before. What is held besides the model are the smaller copies
    alone, and none of a layer that keeps everything. Adapters are attached inside of the block, to the smaller shapes.

    Raises:
        ShapeError: if the keep is not one of this base, or the model is not as wide as the base.
        ConfigError: from a forward pass with a static cache, which is as wide as the config says.
    """
    check(keep, anatomy)
    undo: list[tuple[Any, Mapping[str, Any]]] = []
    for name, shape in whole_shapes(anatomy).items():
        module = model.get_submodule(name)
        if linear_shape(module) != shape:  # also where an adapter is attached already, which would not be cut
            got = linear_shape(module) or f"a {type(module).__name__}"
            raise ShapeError(f"{name}: expected a linear layer of {shape}, as in the base; got {got}")
        sizes = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
        undo.append((module, {at: getattr(module, at) for at in ("weight", "bias", *sizes)}))
    for block, kept in zip(anatomy.blocks, keep.blocks, strict=True):
        for name, values in widths(anatomy.family, block, kept).items():
            module = model.get_submodule(f"{block.prefix}.{name}")
            undo.append((module, {at: getattr(module, at) for at in values}))
    hook = refuse_static_caches(model)
    try:
        for name, cut in cuts(keep, anatomy).items():
            cut_linear(core(model.get_submodule(name)), slice_of(cut))
        fit(model, keep, anatomy)
        yield model
    finally:
        hook.remove()
        for module, values in undo:
            for attribute, value in values.items():
                setattr(module, attribute, value)


def whole_shapes(anatomy: BlockLayout) -> Mapping[str, tuple[int, int]]:
    """Return (out, in) of the linear layers of an unpruned base's blocks, by full name."""
    return dict(zip(anatomy.sides, linear_shapes(anatomy), strict=True))


def refuse_static_caches(model: nn.Module) -> Any:
    """Make a model refuse caches that are laid out by its config; return the hook's handle."""

    def refuse(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, StaticCache):
                expected = "a dynamic cache, whose layers are as wide as what they are given"
                raise ConfigError(
                    Fault("pruning", expected, type(value).__name__, "generate without cache_implementation")
                )

    return model.register_forward_pre_hook(refuse, with_kwargs=True)


def shrink_further(
    model: Any, optimizer: torch.optim.Optimizer, before: ModelStructure, after: ModelStructure, anatomy: BlockLayout
) -> list[nn.Parameter]:
    """Make a pruned model in training smaller still, in place, and return the parameters that the optimizer now holds.

    To be called inside of `pruned` and of `attached`, between two optimizer steps: whoever holds parameters must take
    the new ones. The base's matrices, both adapters and every moment lose the same rows and columns; the optimizer's
    step count stays. `pruned` still gives back what was there before it.

    Args:
        model: with its adapters attached.
        optimizer: over its trainable parameters.
        before: what the model is now.
        after: a part of it.
        anatomy: of the base.

    Raises:
        ShapeError: if `after` is not a part of `before`, or the model is not what `before` says.
    """
    check(after, anatomy)
    old, new = cuts(before, anatomy), cuts(after, anatomy)
    parts = {name: slice_of(cut) for name, cut in within(old, new).items()}
    for name, shape in shapes(whole_shapes(anatomy), old).items():
        if (got := linear_shape(core(model.get_submodule(name)))) != shape:
            raise ShapeError(f"{name}: expected {shape}, as kept before; got {got}")
    for name, part in parts.items():
        module = model.get_submodule(name)
        linear = core(module)
        of_weight = part.weight(linear)
        for was, now in cut_linear(linear, part).items():
            follow(optimizer, was, now, part.rows if was.dim() == 1 else of_weight)
        if linear is not module:
            cut_lora(module, part, optimizer)
    fit(model, after, anatomy)
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def cut_lora(layer: Any, part: Taken, optimizer: torch.optim.Optimizer) -> None:
    """Take columns out of A and rows out of B, of every adapter in one of peft's layers."""
    layer.out_features, layer.in_features = linear_shape(layer.base_layer) or (0, 0)
    for factors, of_factor in ((layer.lora_A, part.columns), (layer.lora_B, part.rows)):
        for factor in factors.values():
            was = factor.weight
            now = smaller(was, of_factor)
            set_parameters(factor, now, None)
            follow(optimizer, was, now, of_factor)


def follow(
    optimizer: torch.optim.Optimizer,
    was: nn.Parameter,
    now: nn.Parameter,
    part: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Put a parameter's part in its place in an optimizer, with the same part of its moments."""
    if was is now:
        return
    for group in optimizer.param_groups:
        group["params"] = [now if parameter is was else parameter for parameter in group["params"]]
    if was in optimizer.state:
        optimizer.state[now] = {
            key: part(value) if isinstance(value, torch.Tensor) and value.shape == was.shape else value
            for key, value in optimizer.state.pop(was).items()
        }


@contextmanager
def gates(model: Any, values: Mapping[str, torch.Tensor]) -> Iterator[Any]:
    """Multiply the inputs of modules by gates, (groups,) by full name, for the length of the block.

    The hook sits on peft's wrapper where there is one: on the layer beneath it the adapter would see what the gate
    hides, and send gradients back past it.
    """

    def gate(value: torch.Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        def multiply(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0]  # (batch, time, in), each group `in / groups` columns in a row
            return x * value.to(x.dtype).repeat_interleave(x.shape[-1] // len(value)), *args[1:]

        return multiply

    hooks = [model.get_submodule(name).register_forward_pre_hook(gate(value)) for name, value in values.items()]
    try:
        yield model
    finally:
        for hook in hooks:
            hook.remove()


def readers(anatomy: BlockLayout, side: Side) -> list[str]:
    """Return the layers whose input is heads (`q`) or channels (`ff`), one a block, in the blocks' order."""
    return [name for name, (_, _, into) in anatomy.sides.items() if into == side]
