"""LoRA adapters on a base that stays as it is: a frozen `global` and a trainable `local` one, attached with peft."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from fedtune.pruning.structure import FULL, LayerSlice
from fedtune.tensors import Tensors


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
    trains, frozen, local, saved = local is not None, frozen or {}, local or {}, saved or {}
    parameters = dict(base.model.named_parameters())
    check_shapes(base, [frozen, local], saved)
    before = {name: parameters[name].detach().clone() for name in saved}
    tuner: LoraModel | None = None
    active = []
    try:
        for name, adapter, factor, drop in (("global", frozen, 1.0, 0.0), ("local", local, scale, dropout)):
            # A module of rank 0 would be refused by peft; without it the layer is the base's own.
            adapter = {module: factors for module, factors in adapter.items() if factors.rank > 0}
            if adapter:
                tuner = inject(base.model, lora_config(base.model, adapter, scale=factor, dropout=drop), name, tuner)
                fill(base, adapter, name)
                active.append(name)
        if tuner is not None:
            tuner.set_adapter(active)
        base.model.requires_grad_(False)
        if "local" in active:
            for side in train:
                for layer in layers(base.model, "local").values():
                    getattr(layer, f"lora_{side.upper()}")["local"].weight.requires_grad_(True)
        for name, array in saved.items():
            parameters[name].data.copy_(to_torch(array, base.device))
            parameters[name].requires_grad_(trains)
        yield base.model
    finally:
        if tuner is not None:
            tuner.unload()
            if hasattr(base.model, "peft_config"):
                del base.model.peft_config
        base.model.requires_grad_(False)
        base.model.zero_grad(set_to_none=True)
        for name, tensor in before.items():
            parameters[name].data.copy_(tensor)


def check_shapes(base: Base, adapters: Sequence[Adapter], saved: Tensors) -> None:
    """Raise ShapeError unless every module and parameter is in the base, in this shape."""
    own = {name: tuple(parameter.shape) for name, parameter in base.model.named_parameters()} | dict(base.modules)
    shapes = [(name, factors.shape) for adapter in adapters for name, factors in adapter.items()]
    for name, shape in [*shapes, *((name, array.shape) for name, array in saved.items())]:
        if shape != own.get(name):
            raise ShapeError(f"{name}: expected {own.get(name, 'no such module')} as in {base.name}; got {shape}")


def inject(model: nn.Module, config: LoraConfig, name: str, tuner: LoraModel | None) -> LoraModel:
    """Wrap a model's layers for one more adapter, and return peft's tuner over it: the given one, or the first."""
    with warnings.catch_warnings():
        # peft warns of a second adapter, which is intended here.
        warnings.filterwarnings("ignore", message=".*multiple adapters.*|Already found a `peft_config`.*")
        if tuner is None:
            return LoraModel(model, {name: config}, name, low_cpu_mem_usage=True)
        tuner.peft_config[name] = config
        tuner.inject_adapter(model, name, low_cpu_mem_usage=True)
        return tuner


def lora_config(model: nn.Module, adapter: Adapter, *, scale: float, dropout: float) -> LoraConfig:
    """Return peft's configuration of exactly these modules and ranks."""
    # peft reads the names as patterns: a dot that is not escaped would match any character.
    ranks = {re.escape(name): factors.rank for name, factors in adapter.items()}
    first = next(iter(adapter))
    return LoraConfig(
        r=adapter[first].rank,
        lora_alpha=scale * adapter[first].rank,
        rank_pattern=ranks,
        alpha_pattern={name: scale * rank for name, rank in ranks.items()},
        target_modules=list(adapter),
        lora_dropout=dropout,
        fan_in_fan_out=isinstance(model.get_submodule(first), Conv1D),
        init_lora_weights=False,  # every factor is written by `fill`
    )


def layers(model: nn.Module, name: str) -> Mapping[str, Any]:
    """Return peft's LoRA layers that hold the adapter `name`, by the name of the module they wrap."""
    return {key: module for key, module in model.named_modules() if name in getattr(module, "lora_A", {})}


def fill(base: Base, adapter: Adapter, name: str) -> None:
    """Write the factors into peft's layers, in float32 on the base's device."""
    wrapped = layers(base.model, name)
    if wrapped.keys() != adapter.keys():
        raise ShapeError(f"adapter {name!r}: expected modules {sorted(adapter)}; got {sorted(wrapped)}")
    for module, factors in adapter.items():
        wrapped[module].lora_A[name].weight = nn.Parameter(to_torch(factors.a, base.device), requires_grad=False)
        wrapped[module].lora_B[name].weight = nn.Parameter(to_torch(factors.b, base.device), requires_grad=False)


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
    sent, rank = task.blobs.get("local", {}), plan.rank
    if strange := sorted(sent.keys() - {f"{name}.{side}" for name in modules for side in "ab"}):
        raise ShapeError(f"{strange[0]}: expected factors .a and .b of modules that get an adapter; got another")
    adapter = {}
    for name, (m, n) in modules.items():
        at = (cut or {}).get(name, FULL)
        a = draw_a(task.a_key, name, rank, n)
        a = a if at.into is None else a[:, at.into]
        b = np.zeros((m if at.out is None else len(at.out), rank), np.float32)
        for key, whole, part in (("a", a, sent.get(f"{name}.a")), ("b", b.T, sent.get(f"{name}.b"))):
            if part is None:
                continue
            rows = part if key == "a" else part.T
            if rows.shape[0] > rank or rows.shape[1:] != whole.shape[1:]:
                raise ShapeError(f"{name}.{key}: expected at most rank {rank} of {whole.shape}; got {part.shape}")
            whole[: rows.shape[0]] = rows
        adapter[name] = Factors(a=a, b=b / np.float32(plan.scale))
    return adapter


def frozen(task: TrainLora) -> Adapter:
    """Return the frozen adapter of a task; a dense `<module>.w` (out, in) becomes exact factors."""
    blob = task.blobs.get("global", {})
    dense = {name.removesuffix(".w"): array for name, array in blob.items() if name.endswith(".w")}
    adapter = dict(unpack({name: array for name, array in blob.items() if not name.endswith(".w")}))
    for name, weight in dense.items():
        w = weight.astype(np.float32)
        if w.ndim != 2:
            raise ShapeError(f"{name}.w: expected (out, in); got {w.shape}")
        m, n = w.shape
        eye = np.eye(min(m, n), dtype=np.float32)
        adapter[name] = Factors(a=w, b=eye) if m <= n else Factors(a=eye, b=w)
    return adapter
