"""LoRA adapters on a base that stays as it is: a frozen `global` and a trainable `local` one, attached with peft."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ShapeError
from fedtune.lora.adapter import Adapter, Factors, draw_a, unpack
from fedtune.messages import Plan, TrainLora
from fedtune.model.base import Base, to_numpy, to_torch
from fedtune.pruning.structure import LayerSlice, slice_factors
from fedtune.tensors import Array, Tensors


@contextmanager
def with_adapters(
    base: Base,
    *,
    frozen: Adapter | None = None,
    local: Adapter | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    train: str = "ab",
    saved: Tensors | None = None,
) -> Iterator[Any]:
    """Attach adapters to the base inside the block, and restore it exactly afterwards.

    Args:
        base: the resident base model.
        frozen: adapter of scale 1 that takes part in the forward pass and gets no gradient.
        local: trainable adapter, its factors as peft trains them (b without the scale).
        scale: the local adapter's alpha / rank.
        dropout: on the local adapter's input.
        train: factors of the local adapter that get gradients, `ab` or `b`.
        saved: values of modules_to_save inside the block; trainable if `local` is given.

    Raises:
        ShapeError: if a module or a parameter is not in the base, or has another shape there.
    """
    model, tuner = base.model, None
    check_shapes(base, [frozen or {}, local or {}], saved or {})
    # peft refuses a module of rank 0; without an adapter the layer is the base's own.
    adapters = {"global": nonzero(frozen or {}), "local": nonzero(local or {})}
    active = [name for name, adapter in adapters.items() if adapter]
    try:
        for name in active:
            factor, drop = (scale, dropout) if name == "local" else (1.0, 0.0)
            tuner = inject(model, adapters[name], name, scale=factor, dropout=drop)
        if tuner is not None:
            tuner.set_adapter(active)
        model.requires_grad_(False)
        # Last, because peft makes the factors of every active adapter trainable.
        for name in active:
            fill(base, adapters[name], name, trainable=train if name == "local" else "")
        with with_saved(base, saved, trainable=local is not None) if saved else nullcontext():
            yield model
    finally:
        if tuner is not None:
            tuner.unload()
        vars(model).pop("peft_config", None)  # with it, peft would take the next adapters for more of these
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)


@contextmanager
def with_saved(base: Base, saved: Tensors, *, trainable: bool) -> Iterator[None]:
    """Give modules_to_save other values inside the block."""
    parameters = dict(base.model.named_parameters())
    before = {name: parameters[name].detach().clone() for name in saved}
    for name, array in saved.items():
        parameters[name].data.copy_(to_torch(array, base.device))
        parameters[name].requires_grad_(trainable)
    try:
        yield
    finally:
        for name, tensor in before.items():
            parameters[name].data.copy_(tensor)


def nonzero(adapter: Adapter) -> Adapter:
    """Return an adapter without its modules of rank 0."""
    return {module: factors for module, factors in adapter.items() if factors.rank > 0}


def check_shapes(base: Base, adapters: Sequence[Adapter], saved: Tensors) -> None:
    """Raise ShapeError unless every module and parameter is in the base, in this shape."""
    own = {name: tuple(parameter.shape) for name, parameter in base.model.named_parameters()} | dict(base.modules)
    shapes = [(name, factors.shape) for adapter in adapters for name, factors in adapter.items()]
    for name, shape in [*shapes, *((name, array.shape) for name, array in saved.items())]:
        if shape != own.get(name):
            raise ShapeError(f"{name}: expected {own.get(name, 'no such module')} as in {base.name}; got {shape}")


def inject(model: nn.Module, adapter: Adapter, name: str, *, scale: float, dropout: float) -> LoraModel:
    """Wrap a model's layers for one adapter, or for one more, and return peft's tuner over all of them."""
    # peft reads the names as patterns: a dot that is not escaped would match any character.
    ranks = {re.escape(module): factors.rank for module, factors in adapter.items()}
    config = LoraConfig(
        rank_pattern=ranks,
        alpha_pattern={module: scale * rank for module, rank in ranks.items()},
        target_modules=list(adapter),
        lora_dropout=dropout,
        fan_in_fan_out=isinstance(model.get_submodule(next(iter(adapter))), Conv1D),
        init_lora_weights=False,  # every factor is written by `fill`
    )
    with warnings.catch_warnings():
        # peft warns of a second adapter, which is intended here.
        warnings.filterwarnings("ignore", message=".*multiple adapters.*|Already found a `peft_config`.*")
        return LoraModel(model, {name: config}, name, low_cpu_mem_usage=True)


def layers(model: nn.Module, name: str) -> Mapping[str, Any]:
    """Return peft's LoRA layers that hold the adapter `name`, by the name of the module they wrap."""
    return {key: module for key, module in model.named_modules() if name in getattr(module, "lora_A", {})}


def fill(base: Base, adapter: Adapter, name: str, *, trainable: str = "") -> None:
    """Write the factors into peft's layers, in float32 on the base's device; those named in `trainable` get gradients.

    Raises:
        ShapeError: if peft wrapped other modules than the adapter's.
    """
    wrapped = layers(base.model, name)
    if wrapped.keys() != adapter.keys():
        raise ShapeError(f"adapter {name!r}: expected modules {sorted(adapter)}; got {sorted(wrapped)}")
    for module, factors in adapter.items():
        a, b = to_torch(factors.a, base.device), to_torch(factors.b, base.device)
        wrapped[module].lora_A[name].weight = nn.Parameter(a, requires_grad="a" in trainable)
        wrapped[module].lora_B[name].weight = nn.Parameter(b, requires_grad="b" in trainable)


def read_local(model: nn.Module) -> Adapter:
    """Return the current factors of the local adapter, b without the scale."""
    return {
        name: Factors(a=to_numpy(layer.lora_A["local"].weight), b=to_numpy(layer.lora_B["local"].weight))
        for name, layer in layers(model, "local").items()
    }


def start(
    task: TrainLora,
    plan: Plan,
    modules: Mapping[str, tuple[int, int]],
    cut: Mapping[str, LayerSlice] | None = None,
) -> Adapter:
    """Return the local adapter that a task starts from, b divided by the scale; see `TrainLora`.

    Args:
        task: its blobs are in the coordinates of the model as it is.
        plan: rank and scale.
        modules: (out, in) of the base's.
        cut: what is kept of each; a fresh A is drawn over the whole base and then cut.
    """
    sent, adapter = task.blobs.get("local", {}), {}
    if strange := sorted(sent.keys() - {f"{name}.{side}" for name in modules for side in "ab"}):
        raise ShapeError(f"{strange[0]}: expected factors .a and .b of modules that get an adapter; got another")
    for name, (m, n) in modules.items():
        fresh = Factors(a=draw_a(task.a_key, name, plan.rank, n), b=np.zeros((m, plan.rank), np.float32))
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


def global_adapter(task: TrainLora) -> Adapter:
    """Return the frozen adapter of a task; a dense `<module>.w` (out, in) becomes exact factors."""
    blob = task.blobs.get("global", {})
    factors = unpack({name: array for name, array in blob.items() if not name.endswith(".w")})
    dense = {name.removesuffix(".w"): array for name, array in blob.items() if name.endswith(".w")}
    return {**factors, **{name: exact_factors(name, array) for name, array in dense.items()}}


def exact_factors(name: str, dense: Array) -> Factors:
    """Return factors whose product is a dense matrix, without any rounding: the matrix and an identity.

    Raises:
        ShapeError: if it has other than two axes.
    """
    w = dense.astype(np.float32)
    if w.ndim != 2:
        raise ShapeError(f"{name}.w: expected (out, in); got {w.shape}")
    m, n = w.shape
    eye = np.eye(min(m, n), dtype=np.float32)
    return Factors(a=w, b=eye) if m <= n else Factors(a=eye, b=w)
