"""Pruned models written as folders: our own form with any widths, and a smaller stock model where blocks are equal."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers.pytorch_utils import Conv1D

from fedtune.errors import ConfigError, Fault, ShapeError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.model.base import Base
from fedtune.model.base_files import readable
from fedtune.model.checkpoint import repair_tensor, slice_tensor
from fedtune.model.device import DTYPES
from fedtune.model.libraries import quiet
from fedtune.model.merge import CastLoss, Merged
from fedtune.model.repair import layer_moments
from fedtune.model.skeleton import aliases, checkpoint_files, match_names, tensor_readers
from fedtune.pruning.least_squares import input_widths
from fedtune.pruning.structure import (
    FULL,
    Block,
    BlockLayout,
    ModelStructure,
    check,
    cuts,
    linear_shapes,
    shapes,
    slice_factors,
)
from fedtune.tensors import Tensors

PREFIX = "fedtune-pruned-"
"""Before the family in `model_type`: a stock class that met these widths unprepared must not know the folder."""
FORMAT = 1
"""Version of the entry `fedtune_pruning` in config.json."""


def write(
    out: Path,
    base: Base,
    structure: ModelStructure,
    layout: BlockLayout,
    adapter: Adapter | None,
    *,
    saved: Tensors,
    dtype: str,
    revision: str | None,
    moments: Tensors | None = None,
    manifest: bool = False,
) -> Merged:
    """Write a pruned model of any widths as a folder that `deployed.load` reads and stock transformers refuses.

    Args:
        out: the folder.
        base: its checkpoint must still be where it was loaded from.
        structure: the heads and channels that stay.
        layout: of the base.
        adapter: in the base's coordinates, scale 1, merged in; or None.
        saved: values of modules_to_save, in the base's coordinates.
        dtype: of the tensors, a key of `DTYPES`.
        revision: of the base.
        moments: by which layers are repaired; none: they are not.
        manifest: whether the caller adds one: the folder is refused without it then. Those of 0.2.0 have none.

    Raises:
        ShapeError: if the structure or a factor is not one of this base.
    """
    config = json.loads(base.model.config.to_json_string())
    config["model_type"] = PREFIX + layout.family
    config["fedtune_pruning"] = {
        "format": FORMAT,
        "task": base.task,
        "blocks": [
            {"heads": len(units.q), "kv_heads": len(units.kv), "channels": len(units.ff)}
            for units in check(structure, layout).blocks
        ],
    }
    if manifest:
        config["fedtune_pruning"]["manifest"] = True
    if added := added_biases(base.model, structure, layout, moments or {}):
        config["fedtune_pruning"]["biases"] = added
    config["dtype"] = dtype
    merged = write_tensors(
        out, base, structure, layout, adapter, saved=saved, dtype=dtype, revision=revision, moments=moments
    )
    # Last, so that a folder that was not finished is no model.
    (out / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return merged


def write_uniform(
    out: Path,
    base: Base,
    structure: ModelStructure,
    layout: BlockLayout,
    adapter: Adapter | None,
    *,
    saved: Tensors,
    dtype: str,
    revision: str | None,
    moments: Tensors | None = None,
) -> Merged:
    """Write a pruned model whose blocks are equally wide as a folder that stock transformers loads; see `write`.

    Raises:
        ConfigError: if no stock config describes these widths.
        ShapeError: if the structure or a factor is not one of this base.
    """
    added = added_biases(base.model, structure, layout, moments or {})
    if added and layout.family != "llama":
        expected = f"layers that have a bias in a stock {layout.family}"
        hint = 'train with pruning.repair = "none" for that; the folder model has the biases as they are'
        raise ConfigError(Fault("export", expected, f"{len(added)} that a repair gives one, {added[0]}", hint))
    config = uniform_config(base.model.config, structure, layout)
    if added:  # a stock Llama has one in every layer of a block, or in none
        config.attention_bias = config.mlp_bias = True
    config.dtype = DTYPES[dtype]
    config.architectures = [type(base.model).__name__]
    merged = write_tensors(
        out,
        base,
        structure,
        layout,
        adapter,
        saved=saved,
        dtype=dtype,
        revision=revision,
        moments=moments,
        zero_biases=bool(added),
    )
    config.save_pretrained(out)
    return merged


def added_biases(model: Any, structure: ModelStructure, layout: BlockLayout, moments: Tensors) -> list[str]:
    """Return the layers without a bias that get one by a repair, by full name."""
    slices = cuts(structure, layout)
    return [
        name
        for name, n in input_widths(layout).items()
        if layer_moments(moments, name)
        and (at := slices[name].into) is not None
        and len(at) < n
        and model.get_submodule(name).bias is None
    ]


def write_tensors(
    out: Path,
    base: Base,
    structure: ModelStructure,
    layout: BlockLayout,
    adapter: Adapter | None,
    *,
    saved: Tensors,
    dtype: str,
    revision: str | None,
    moments: Tensors | None = None,
    zero_biases: bool = False,
) -> Merged:
    """Write everything of a model folder but the config; with a bias of zero for layers of blocks that have none."""
    for name, factors in (adapter or {}).items():
        if base.modules.get(name) != factors.shape:
            raise ShapeError(f"{name}: expected {base.modules.get(name, 'no such module')}; got {factors.shape}")
    out.mkdir(parents=True, exist_ok=True)
    tensors, merged = pruned_tensors(
        base, structure, layout, adapter or {}, saved, dtype=dtype, revision=revision, moments=moments or {}
    )
    if zero_biases:
        shapes_after = shapes(dict(zip(layout.sides, linear_shapes(layout), strict=True)), cuts(structure, layout))
        zeros = {f"{name}.bias": torch.zeros(m, dtype=DTYPES[dtype]) for name, (m, _) in shapes_after.items()}
        tensors = {**zeros, **tensors}
    # transformers refuses a file whose metadata does not name a framework.
    save_file(dict(tensors), out / "model.safetensors", metadata={"format": "pt"})
    with quiet():
        if base.model.can_generate():
            base.model.generation_config.save_pretrained(out)
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(out)
    return merged


def pruned_tensors(
    base: Base,
    structure: ModelStructure,
    layout: BlockLayout,
    adapter: Adapter,
    saved: Tensors,
    *,
    dtype: str,
    revision: str | None,
    moments: Tensors,
) -> tuple[Mapping[str, torch.Tensor], Merged]:
    """Return every tensor of the pruned model by its first name, the adapter merged in, and what the cast cost.

    The base is read again from its checkpoint, tensor by tensor, and is cast once, at the end; see `merge`.
    """
    model, slices = base.model, cuts(check(structure, layout), layout)
    state, first_names = model.state_dict(), aliases(model)
    readers = tensor_readers(checkpoint_files(readable(base.path, revision), revision))
    readers = match_names(readers, state.keys(), model.base_model_prefix)
    tensors, loss, shifts = {}, CastLoss(DTYPES[dtype]), dict[str, torch.Tensor]()
    check_untied(adapter, first_names)
    # Biases last: what a repair adds to them follows from the weight.
    for name in sorted(state, key=lambda name: name.endswith(".bias")):
        names = [other for other in state if first_names[other] == first_names[name]]
        # A tied tensor is written once, as transformers does; loading ties it again.
        if name != names[0]:
            continue
        read = next((readers[other] for other in names if other in readers), None)
        trained = next((saved[other] for other in names if other in saved), None)
        if trained is not None:
            whole = torch.from_numpy(np.array(trained, np.float32))
        # A tensor that the checkpoint lacks was drawn when the base was loaded.
        else:
            whole = state[name].detach().cpu() if read is None else read()
        if whole.shape != state[name].shape:
            raise ShapeError(f"{name}: expected {tuple(state[name].shape)}; got {tuple(whole.shape)}")
        part = slice_tensor(model, name, whole, slices)
        # Merged in float32 whatever the checkpoint's format, so that nothing is rounded twice.
        weight = part.float() if part.is_floating_point() else part.clone()
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and (mended := repair_tensor(model, module, whole.float(), moments, slices)):
            weight, shifts[module] = mended
        if name.endswith(".bias") and (shift := shifts.pop(name.removesuffix(".bias"), None)) is not None:
            weight = weight + shift
        if name.endswith(".weight") and module in adapter:
            change = weight_change(slice_factors(adapter[module], slices.get(module, FULL)))
            if isinstance(model.get_submodule(module), Conv1D):
                change = change.T
            after = (weight.double() + change).float()
            loss.add(weight, after, change)
            weight = after
        target = DTYPES[dtype] if weight.is_floating_point() else weight.dtype
        tensors[name] = weight.to(target, copy=True).contiguous()
    tensors |= {f"{module}.bias": shift.to(DTYPES[dtype], copy=True) for module, shift in shifts.items()}
    return tensors, loss.result()


def weight_change(factors: Factors) -> torch.Tensor:
    """Return the product of the factors, (out, in), float64."""
    # The arrays of a state are read-only views: torch.from_numpy would warn of them, torch.tensor copies.
    return torch.tensor(factors.b).double() @ torch.tensor(factors.a).double()  # (out, in)


def check_untied(adapter: Adapter, first_names: Mapping[str, str]) -> None:
    """Refuse to merge into a layer whose weight is also that of another one, which would change with it.

    Raises:
        ConfigError: naming both.
    """
    tied = [name for name in sorted(adapter) if first_names.get(f"{name}.weight", "") not in ("", f"{name}.weight")]
    if tied:
        hint = "leave it out of adapter.targets; peft itself puts such an adapter beside the whole base"
        other = first_names[f"{tied[0]}.weight"]
        expected = f"adapters on layers of their own; {tied[0]} shares its weight with {other}"
        raise ConfigError(Fault("adapter.targets", expected, f"{len(tied)} such", hint))


def merge_into(model: Any, structure: ModelStructure, layout: BlockLayout, adapter: Adapter, saved: Tensors) -> None:
    """Add an adapter to a pruned model in place, and write the values of modules_to_save.

    Both are in the base's coordinates.

    Raises:
        ShapeError: if a factor is not one of this base.
        ConfigError: if a layer shares its weight with another.
    """
    check_untied(adapter, aliases(model))
    slices, parameters = cuts(check(structure, layout), layout), dict(model.named_parameters())
    strange = sorted({*(f"{name}.weight" for name in adapter), *saved} - parameters.keys())
    if strange:
        raise ShapeError(f"{strange[0]}: expected a parameter of the base; it has none of that name")
    with torch.no_grad():
        for name, factors in adapter.items():
            weight = parameters[f"{name}.weight"]
            change = weight_change(slice_factors(factors, slices.get(name, FULL))).to(weight.device)
            if isinstance(model.get_submodule(name), Conv1D):
                change = change.T
            # Checked by hand: the sum of tensors that do not fit could broadcast.
            if change.shape != weight.shape:
                raise ShapeError(f"{name}: expected a change of {tuple(weight.shape)}; got {tuple(change.shape)}")
            weight.copy_(weight.double() + change)
        for name, values in saved.items():
            if values.shape != tuple(parameters[name].shape):
                raise ShapeError(f"{name}: expected {tuple(parameters[name].shape)}; got {values.shape}")
            parameters[name].copy_(torch.from_numpy(np.array(values, np.float32)))


def uniform_config(config: Any, structure: ModelStructure, layout: BlockLayout) -> Any:
    """Return the stock config of a pruned model whose blocks are equally wide.

    Raises:
        ConfigError: if they are not, or the family's config cannot express it, with the nearest counts that it can.
    """
    counts = [(len(units.q), len(units.kv), len(units.ff)) for units in check(structure, layout).blocks]
    block = layout.blocks[0]
    if len(set(counts)) > 1 or len({(b.heads, b.kv_heads, b.channels) for b in layout.blocks}) > 1:
        got = "; ".join(
            f"{name} from {min(part)} to {max(part)}"
            for name, part in zip(("heads", "key/value heads", "channels"), zip(*counts, strict=True), strict=True)
            if len(set(part)) > 1
        )
        hint = 'for that train with pruning.allocation = "uniform"; the folder model has the widths as they are'
        raise ConfigError(
            Fault("export", "blocks of equal widths, as a stock config has them", got or "a base without", hint)
        )
    heads, kv_heads, channels = counts[0]
    if not fits_stock(layout, block, heads):
        nearest = sorted(sorted(stock_head_counts(layout, block), key=lambda count: abs(count - heads))[:2])
        expected = f"{' or '.join(map(str, nearest))} heads in every block, which a stock {layout.family} can have"
        raise ConfigError(
            Fault("export", expected, str(heads), "prune to that; the folder model has the widths as they are")
        )
    smaller = copy.deepcopy(config)
    if layout.family == "gpt2":
        smaller.n_inner = channels
    else:
        smaller.intermediate_size = channels
    if layout.family in ("llama", "mistral", "qwen2", "qwen3"):
        smaller.num_attention_heads, smaller.num_key_value_heads = heads, kv_heads
        smaller.head_dim = block.head_dim
    return smaller


def stock_head_counts(layout: BlockLayout, block: Block) -> Sequence[int]:
    """Return the head counts of a pruned block that the stock config of the family can express."""
    possible = {kv * share for kv in range(1, block.kv_heads + 1) for share in range(1, block.group + 1)}
    return [heads for heads in sorted(possible) if fits_stock(layout, block, heads)]


def fits_stock(layout: BlockLayout, block: Block, heads: int) -> bool:
    """Return whether the stock config of a family can express a block with so many heads."""
    if layout.family in ("gpt2", "bert", "roberta"):  # they know a head's size only as width / heads
        return heads == block.heads
    # Stock Llama checks that the width is a multiple of the heads, though its head_dim is set.
    return layout.family != "llama" or layout.width % heads == 0
