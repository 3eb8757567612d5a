"""Structured pruning in place: a model whose blocks hold fewer heads and channels inside a `with` block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import StaticCache
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ConfigError, Fault, ShapeError, type_of
from fedtune.model.frozen import is_changed, own_weight, set_own_weight
from fedtune.model.quantised_linear import QuantisedLinear
from fedtune.model.repair import Repair, put_repaired
from fedtune.model.targets import linear_shape
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
            experts, cross attention, layers quantised by others or tensor-parallel ones.
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
    # A block's name is its first layer's name without the layer; a bare model has no prefix before it.
    prefixes = [name.removesuffix(f".{first}") for name in modules if name.endswith(f".{first}")]
    blocks = []
    for prefix in prefixes:
        sizes: dict[Side, int] = {}
        for layer, sides in FAMILIES[family].items():
            module = modules.get(f"{prefix}.{layer}")
            shape = None if module is None else linear_shape(module)
            # Others multiply in a way of their own. Of codes the blocks are known, for costs; see `refuse_codes`.
            if shape is None or type(module) not in (nn.Linear, Conv1D, QuantisedLinear):
                got = "missing" if module is None else type(module).__name__
                raise unsupported_error(family, f"whose {prefix}.{layer} is {got}")
            sizes |= dict(zip(sides, shape, strict=True))
        size = head_dim(family, modules, prefix)
        heads = sizes["q"] // size
        blocks.append(Block(prefix, heads, sizes["kv"] // size if "kv" in sizes else heads, size, sizes["ff"]))
    if not blocks:
        raise unsupported_error(family, f"without a layer {first}")
    return BlockLayout(family=family, blocks=tuple(blocks), width=int(config.hidden_size))


def refuse_codes(model: Any, layout: BlockLayout) -> None:
    """Raise ConfigError for a model whose layers are quantised: columns taken out of codes leave blocks of others."""
    for name in layout.sides:
        if isinstance(core(model.get_submodule(name)), QuantisedLinear):
            raise unsupported_error(layout.family, f"whose {name} is quantised: its columns share scales")


def unsupported_error(family: str, reason: str) -> ConfigError:
    expected = f"a model of type {', '.join(FAMILIES)}, with plain linear layers for queries, keys, values and channels"
    return ConfigError(Fault("pruning", expected, f"{family!r} ({reason})", "leave pruning out, or use another base"))


def head_dim(family: str, modules: Mapping[str, Any], prefix: str) -> int:
    # Asked of the module: the config's width / heads is wrong where the family has a head_dim of its own.
    match family:
        case "gpt2":
            return int(modules[f"{prefix}.attn"].head_dim)
        case "bert" | "roberta":
            return int(modules[f"{prefix}.attention.self"].attention_head_size)
        case _:
            return int(modules[f"{prefix}.self_attn"].head_dim)


def core(module: Any) -> Any:
    """Return the linear layer beneath an adapter, or the module itself."""
    return getattr(module, "base_layer", module)


def widths(family: str, block: Block, units: BlockStructure) -> Mapping[str, Mapping[str, int]]:
    """Return the attributes of a block's modules, other than linear layers, that follow from what is kept.

    `scaling` and the size of a head are those of the base: heads are taken out whole.
    """
    heads, wide = len(units.q), len(units.q) * block.head_dim
    match family:
        case "gpt2":
            return {"attn": {"num_heads": heads, "split_size": wide, "embed_dim": wide}}
        case "bert" | "roberta":
            return {"attention.self": {"num_attention_heads": heads, "all_head_size": wide}}
        case _:
            return {
                "self_attn": {"num_key_value_groups": heads // len(units.kv)},
                "mlp": {"intermediate_size": len(units.ff)},
            }


def fit(model: Any, structure: ModelStructure, layout: BlockLayout) -> None:
    """Write the attributes that follow from what is kept into a model's blocks, in place."""
    for block, units in zip(layout.blocks, structure.blocks, strict=True):
        for name, values in widths(layout.family, block, units).items():
            module = model.get_submodule(f"{block.prefix}.{name}")
            for attribute, value in values.items():
                setattr(module, attribute, value)


@dataclass(frozen=True)
class SliceIndex:
    """The rows and columns of one linear layer that stay, as index tensors; None: all of them."""

    out: torch.Tensor | None
    into: torch.Tensor | None

    def weight(self, module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the function that slices a tensor of the weight's shape: (out, in), or (in, out) in GPT-2."""
        first, second = (self.into, self.out) if isinstance(module, Conv1D) else (self.out, self.into)
        return lambda tensor: take(take(tensor, 0, first), 1, second)

    def rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the kept part of a bias, or of a LoRA factor B."""
        return take(tensor, 0, self.out)

    def columns(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the kept part of a LoRA factor A."""
        return take(tensor, 1, self.into)


def take(tensor: torch.Tensor, axis: int, at: torch.Tensor | None) -> torch.Tensor:
    """Return a contiguous copy of a part of a tensor; the tensor itself where the part is all of it."""
    return tensor if at is None or len(at) == tensor.shape[axis] else tensor.index_select(axis, at.to(tensor.device))


def slice_index(cut: LayerSlice) -> SliceIndex:
    """Return a slice of a layer as index tensors."""
    return SliceIndex(*(None if part is None else torch.from_numpy(part) for part in (cut.out, cut.into)))


def slice_parameter(parameter: nn.Parameter, part: Callable[[torch.Tensor], torch.Tensor]) -> nn.Parameter:
    """Return a parameter that holds a part of another and of its gradient; the same object if that is all of it."""
    # The same object, so that layers which lose nothing take no memory and the optimizer keeps its entry.
    with torch.no_grad():
        data = part(parameter.data)
        if data.shape == parameter.shape:
            return parameter
        smaller = nn.Parameter(data, requires_grad=parameter.requires_grad)
        if parameter.grad is not None:
            smaller.grad = part(parameter.grad)
    return smaller


def set_parameters(module: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    """Replace a linear layer's parameters, and set the sizes that follow from them."""
    module.weight = weight
    if bias is not None:
        module.bias = bias
    if isinstance(module, Conv1D):
        module.nx, module.nf = weight.shape
    else:
        module.out_features, module.in_features = weight.shape


def cut_linear(module: Any, part: SliceIndex) -> Mapping[nn.Parameter, nn.Parameter]:
    """Take rows and columns out of a linear layer, in place; return (old, new) of the parameters that changed."""
    weight, bias = module.weight, module.bias
    set_parameters(
        module,
        slice_parameter(weight, part.weight(module)),
        None if bias is None else slice_parameter(bias, part.rows),
    )
    pairs = [(weight, module.weight), (bias, module.bias)]
    return {old: new for old, new in pairs if old is not None and old is not new}


@contextmanager
def with_structure(
    model: Any, structure: ModelStructure, layout: BlockLayout, repair: Repair | None = None
) -> Iterator[Any]:
    """Take heads and channels out of a model inside the block: smaller matrices, no masks.

    With a repair what is left makes up for them; layers that lose inputs then have a bias, also where they had none.

    Afterwards every parameter is the object that it was before. The memory beside the model is that of the smaller
    copies alone; a layer that keeps everything is not copied. Adapters are attached inside the block, to the smaller
    shapes.

    Raises:
        ShapeError: if the structure is not one of this base, or the model is not as wide as the base.
        ConfigError: from a forward pass with a static cache, which is as wide as the config says.
    """
    check(structure, layout)
    refuse_codes(model, layout)
    # The old objects themselves: nothing is copied back, so that the base is bit for bit what it was.
    undo: list[tuple[Any, Mapping[str, Any]]] = []
    for name, shape in whole_shapes(layout).items():
        module = model.get_submodule(name)
        # Also where an adapter is attached already: it would keep its old shape.
        if linear_shape(module) != shape:
            got = linear_shape(module) or type_of(module)
            raise ShapeError(f"{name}: expected a linear layer of {shape}, as in the base; got {got}")
        sizes = ("nf", "nx") if isinstance(module, Conv1D) else ("out_features", "in_features")
        undo.append((module, {at: getattr(module, at) for at in ("weight", "bias", *sizes)}))
    for block, units in zip(layout.blocks, structure.blocks, strict=True):
        for name, values in widths(layout.family, block, units).items():
            module = model.get_submodule(f"{block.prefix}.{name}")
            undo.append((module, {at: getattr(module, at) for at in values}))
    hook = refuse_static_caches(model)
    try:
        for name, part in cuts(structure, layout).items():
            linear = core(model.get_submodule(name))
            cut_linear(linear, slice_index(part))
            if repair and (parameters := repair.parameters(name, part)):
                put_repaired(linear, *parameters)
        fit(model, structure, layout)
        yield model
    finally:
        hook.remove()
        for module, values in undo:
            for attribute, value in values.items():
                setattr(module, attribute, value)


def whole_shapes(layout: BlockLayout) -> Mapping[str, tuple[int, int]]:
    """Return (out, in) of the linear layers of an unpruned base's blocks, by full name."""
    return dict(zip(layout.sides, linear_shapes(layout), strict=True))


def refuse_static_caches(model: nn.Module) -> Any:
    """Make a model refuse caches that are laid out by its config; return the hook's handle."""
    # The config still has the base's widths: such a cache would be filled in part, and attention would see zeros.

    def refuse(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, StaticCache):
                expected = "a dynamic cache, whose layers are as wide as their input"
                raise ConfigError(
                    Fault("pruning", expected, type(value).__name__, "generate without cache_implementation")
                )

    return model.register_forward_pre_hook(refuse, with_kwargs=True)


def shrink_further(
    model: Any,
    optimizer: torch.optim.Optimizer,
    before: ModelStructure,
    after: ModelStructure,
    layout: BlockLayout,
    start: MutableMapping[nn.Parameter, torch.Tensor] | None = None,
    repair: Repair | None = None,
) -> list[nn.Parameter]:
    """Shrink a pruned model in training further, in place, and return the parameters that the optimizer now holds.

    To be called inside `with_structure` and `with_adapters`, between two optimizer steps; the caller must use the new
    parameters from then on. The base's matrices, both adapters and every moment lose the same rows and columns; the
    optimizer's step count stays. `with_structure` still restores the whole model.

    Args:
        model: with its adapters attached.
        optimizer: over its trainable parameters.
        before: the structure that the model has now.
        after: a part of it.
        layout: of the base.
        start: values by parameter that are sliced as the parameters are, in place.
        repair: by which `with_structure` has repaired the model.

    Raises:
        ShapeError: if `after` is not a part of `before`, or the model is not what `before` says.
    """
    check(after, layout)
    old, new = cuts(before, layout), cuts(after, layout)
    # Relative to what is there now, and checked before the first matrix changes.
    parts = {name: slice_index(part) for name, part in within(old, new).items()}
    start = {} if start is None else start
    for name, shape in shapes(whole_shapes(layout), old).items():
        if (got := linear_shape(core(model.get_submodule(name)))) != shape:
            raise ShapeError(f"{name}: expected {shape}, as the structure before has it; got {got}")
    for name, part in parts.items():
        module = model.get_submodule(name)
        linear = core(module)
        of_weight = part.weight(linear)
        own = own_weight(linear)
        for was, now in cut_linear(linear, part).items():
            replace_in_optimizer(optimizer, start, was, now, part.rows if was.dim() == 1 else of_weight)
        if is_changed(linear):
            set_own_weight(linear, slice_parameter(own, of_weight))
        if repair and (parameters := repair.parameters(name, new[name])):
            repair_further(linear, *parameters)
        if linear is not module:
            cut_lora(module, part, optimizer, start)
    fit(model, after, layout)
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def repair_further(linear: Any, weight: torch.Tensor, bias: torch.Tensor) -> None:
    """Replace the repair of a larger structure, of which a layer now holds a part, by its own, in place."""
    changed = linear.weight
    own = own_weight(linear)
    if is_changed(linear):
        with torch.no_grad():
            # The change that was added stays; what it was added to is another.
            stored = weight.T if isinstance(linear, Conv1D) else weight
            changed.add_(stored - own)
            own.copy_(stored)
        linear.bias = nn.Parameter(bias, requires_grad=False)
    else:
        put_repaired(linear, weight, bias)


def cut_lora(
    layer: Any, part: SliceIndex, optimizer: torch.optim.Optimizer, start: MutableMapping[nn.Parameter, torch.Tensor]
) -> None:
    """Take columns out of A and rows out of B of a LoRA layer, and both out of what is frozen in it, in place."""
    if layer.frozen:
        first, *rest = layer.frozen
        layer.frozen = (part.columns(first), *rest)
        layer.frozen = (*layer.frozen[:-1], part.rows(layer.frozen[-1]))
    for side, of_factor in (("a", part.columns), ("b", part.rows)):
        was = getattr(layer, side)
        if was is not None:
            now = slice_parameter(was, of_factor)
            setattr(layer, side, now)
            replace_in_optimizer(optimizer, start, was, now, of_factor)


def replace_in_optimizer(
    optimizer: torch.optim.Optimizer,
    start: MutableMapping[nn.Parameter, torch.Tensor],
    was: nn.Parameter,
    now: nn.Parameter,
    part: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Replace a parameter by its part in an optimizer, with the same part of its moments and of its start value."""
    if was is now:
        return
    if was in start:
        start[now] = part(start.pop(was))
    for group in optimizer.param_groups:
        group["params"] = [now if parameter is was else parameter for parameter in group["params"]]
    if was in optimizer.state:
        # Moments have the parameter's shape; the step count is a single number, and stays.
        optimizer.state[now] = {
            key: part(value) if isinstance(value, torch.Tensor) and value.shape == was.shape else value
            for key, value in optimizer.state.pop(was).items()
        }
