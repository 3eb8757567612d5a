"""LoRA adapters on a base that stays as it is: a frozen change in its weights, and a trainable adapter beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from fedtune.errors import ShapeError
from fedtune.lora.adapter import Adapter, Factors, draw_a, unpack
from fedtune.messages import Plan, TrainLora
from fedtune.model.base import Base, to_numpy, to_torch
from fedtune.model.frozen import (
    FrozenChange,
    beside,
    change_weight,
    check_dense,
    is_exact,
    is_slight,
    put,
    read_weights,
    restore,
)
from fedtune.model.lora_layer import FrozenParts, LoraLayer, Trainable
from fedtune.model.virtual_tokens import with_virtual_tokens
from fedtune.pruning.structure import LayerSlice, slice_factors
from fedtune.tensors import Array, Tensors


@contextmanager
def with_adapters(
    base: Base,
    *,
    frozen: FrozenChange | None = None,
    local: Adapter | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    train: str = "ab",
    saved: Tensors | None = None,
    half: bool = False,
) -> Iterator[Any]:
    """Attach adapters to the base inside the block, and restore it exactly afterwards.

    A frozen change is added to a second copy of the layer's weight, which takes the weight's place: a step then costs
    what it costs without it. The copy stays with the base, and clients of the same change share it. Layers in 16 bits,
    quantised ones, and those whose change is of a small rank keep their weight and multiply by the change beside it;
    see `frozen.is_exact` and `frozen.is_slight`.

    Args:
        base: the resident base model.
        frozen: a change of scale 1 that takes part in the forward pass and gets no gradient.
        local: trainable adapter, its factors as they are trained (b without the scale).
        scale: the local adapter's alpha / rank.
        dropout: on the local adapter's input.
        train: factors of the local adapter that get gradients, `ab` or `b`.
        saved: values of modules_to_save inside the block; trainable if `local` is given.
        half: products are rounded to 16 bits, as under autocast, whatever the format of the base.

    Raises:
        ShapeError: if a module or a parameter is not in the base, or has another shape there.
    """
    model = base.model
    frozen, local, saved = nonzero(frozen or {}), local and nonzero(local), saved or {}
    check_shapes(base, [frozen, local or {}], saved)
    model.requires_grad_(False)
    try:
        with ExitStack() as stack:
            parts = stack.enter_context(with_change(base, frozen, half=half))
            trainable = {
                name: Trainable(*parameters(factors, base.device, train=train), scale, dropout)
                for name, factors in (local or {}).items()
            }
            stack.enter_context(with_layers(model, trainable, parts))
            if saved and base.virtual:
                virtual = with_virtual_tokens(model, base.virtual, saved, trainable=local is not None)
                stack.enter_context(virtual)
            elif saved:
                stack.enter_context(with_saved(base, saved, trainable=local is not None))
            yield model
    finally:
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)


@contextmanager
def with_change(base: Base, frozen: FrozenChange, *, half: bool) -> Iterator[Mapping[str, FrozenParts]]:
    """Add frozen changes to the weights of the base's layers inside the block; yield those that no weight can take.

    The sums stay with the base until a block whose change they are not part of.
    """
    modules = {name: base.model.get_submodule(name) for name in frozen}
    exact = {name for name, change in frozen.items() if is_exact(modules[name], half=half) and not is_slight(change)}
    # Taken out for as long as layers read them: what is attached meanwhile must not write over them.
    resident = {name: base.changed.pop(name, None) for name in exact}
    # Of another run or round: without this they would stay in memory for as long as the base does.
    base.changed.clear()
    changed, before = {}, {}
    try:
        for name in frozen:
            if name in exact:
                changed[name] = change_weight(modules[name], frozen[name], resident.pop(name))
                # First, so that Ctrl-C at any moment leaves the base as it was.
                before[name] = read_weights(modules[name])
                put(modules[name], changed[name])
        yield {name: beside(change, base.device) for name, change in frozen.items() if name not in exact}
    finally:
        for name, weights in before.items():
            restore(modules[name], weights)
        base.changed.update(changed)


@contextmanager
def with_layers(
    model: nn.Module, trainable: Mapping[str, Trainable], frozen: Mapping[str, FrozenParts]
) -> Iterator[None]:
    """Put LoRA layers into the places of a model's linear layers inside the block."""
    places: list[tuple[nn.Module, str, nn.Module]] = []
    try:
        for name in {**trainable, **frozen}:
            parent, _, leaf = name.rpartition(".")
            owner, layer = model.get_submodule(parent), model.get_submodule(name)
            places.append((owner, leaf, layer))
            setattr(owner, leaf, LoraLayer(layer, trainable.get(name), frozen.get(name, ())))
        yield
    finally:
        for owner, leaf, layer in places:
            setattr(owner, leaf, layer)


def parameters(factors: Factors, device: torch.device, *, train: str) -> tuple[nn.Parameter, nn.Parameter]:
    """Return factors a and b in float32; those named in `train` get gradients."""
    a, b = (to_torch(factor, device) for factor in (factors.a, factors.b))
    return nn.Parameter(a, requires_grad="a" in train), nn.Parameter(b, requires_grad="b" in train)


@contextmanager
def with_saved(base: Base, saved: Tensors, *, trainable: bool) -> Iterator[None]:
    """Give modules_to_save other values inside the block."""
    parameters = dict(base.model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in saved}
    try:
        for name, array in saved.items():
            parameters[name].data.copy_(to_torch(array, base.device))
            parameters[name].requires_grad_(trainable)
        yield
    finally:
        for name, tensor in before.items():
            parameters[name].data.copy_(tensor)


def nonzero(change: FrozenChange) -> Any:
    """Return a change without its modules of rank 0: without an adapter a layer is the base's own."""
    return {name: part for name, part in change.items() if not isinstance(part, Factors) or part.rank > 0}


def check_shapes(base: Base, changes: Sequence[FrozenChange], saved: Tensors) -> None:
    """Raise ShapeError unless every module and parameter is in the base, in this shape."""
    own = {name: tuple(parameter.shape) for name, parameter in base.model.named_parameters()} | dict(base.modules)
    own |= {name: array.shape for name, array in base.saved_tensors().items()} if base.virtual else {}
    shapes = [(name, part.shape) for change in changes for name, part in change.items()]
    for name, shape in [*shapes, *((name, array.shape) for name, array in saved.items())]:
        if shape != own.get(name):
            raise ShapeError(f"{name}: expected {own.get(name, 'no such module')} as in {base.name}; got {shape}")


def layers(model: nn.Module) -> Mapping[str, LoraLayer]:
    """Return the layers with a trainable adapter, by full name."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoraLayer) and module.a is not None
    }


def read_local(model: nn.Module) -> Adapter:
    """Return the current factors of the local adapter, b without the scale."""
    return {name: Factors(a=to_numpy(layer.a), b=to_numpy(layer.b)) for name, layer in layers(model).items()}


def start(
    task: TrainLora,
    plan: Plan,
    modules: Mapping[str, tuple[int, int]],
    cut: Mapping[str, LayerSlice] | None = None,
) -> Adapter:
    """Return the local adapter that a task starts from, b divided by the scale; see `TrainLora`.

    Modules of rank 0 have none: no backward pass goes below the lowest block that has a module with one.

    Args:
        task: its blobs are in the coordinates of the model as it is.
        plan: ranks and scale.
        modules: (out, in) of the base's.
        cut: what is kept of each; a fresh A is drawn over the whole base and then cut.
    """
    sent, adapter, ranks = task.blobs.get("local", {}), {}, plan.rank_of(modules)
    if strange := sorted(sent.keys() - {f"{name}.{side}" for name in ranks for side in "ab"}):
        raise ShapeError(f"{strange[0]}: expected factors .a and .b of modules that get an adapter; got another")
    for name, (m, n) in modules.items():
        if name not in ranks:
            continue
        fresh = Factors(a=draw_a(task.a_key, name, ranks[name], n), b=np.zeros((m, ranks[name]), np.float32))
        if cut and name in cut:
            fresh = slice_factors(fresh, cut[name])
        for key, rows in ((f"{name}.a", fresh.a), (f"{name}.b", fresh.b.T)):
            if key in sent:
                overwrite(rows, sent[key] if rows is fresh.a else sent[key].T, key)
        adapter[name] = Factors(a=fresh.a, b=fresh.b / np.float32(plan.scale))
    return adapter


def overwrite(rows: Array, sent: Array, name: str) -> None:
    """Write what was sent into the first rows of a fresh factor; b is given and sent transposed, (rank, out)."""
    if sent.shape[1:] != rows.shape[1:] or len(sent) > len(rows):
        raise ShapeError(f"{name}: expected at most rank {len(rows)} of {rows.shape}; got {sent.shape}")
    rows[: len(sent)] = sent


def frozen_change(task: TrainLora) -> FrozenChange:
    """Return what a task freezes: factors, and dense changes from `<module>.w` (out, in)."""
    blob = task.blobs.get("global", {})
    factors = unpack({name: array for name, array in blob.items() if not name.endswith(".w")})
    dense = {name.removesuffix(".w"): array for name, array in blob.items() if name.endswith(".w")}
    return {**factors, **{name: check_dense(name, array) for name, array in dense.items()}}
