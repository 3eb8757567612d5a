"""A base read from its checkpoint at its pruned widths, one tensor at a time: the whole base is never in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.pytorch_utils import Conv1D

from fedtune.model.base_config import read_config
from fedtune.model.base_files import check_folder, locate, not_found, readable
from fedtune.model.classes import output_layer
from fedtune.model.device import DTYPES, choose_device, number_format
from fedtune.model.load_checks import check_complete
from fedtune.model.repair import layer_moments, repair_layer
from fedtune.model.settings import ModelSettings
from fedtune.model.skeleton import (
    aliases,
    checkpoint_files,
    fill,
    finish,
    match_names,
    place,
    set_generation_config,
    skeleton,
    state_of,
    tensor_readers,
)
from fedtune.model.surgery import cut_linear, fit, layout_of, refuse_static_caches, slice_index
from fedtune.pruning.structure import FULL, BlockLayout, LayerSlice, ModelStructure, check, cuts
from fedtune.seeds import derive
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class PrunedBase:
    """A base at its pruned widths, and what its checkpoint held."""

    model: Any
    """transformers.PreTrainedModel at its pruned widths, in eval mode, nothing requires grad."""
    new: Sequence[str]
    """Names of the parameters that the checkpoint lacks."""
    digest: str
    """Of the whole base, as `base.digest` gives it."""


def load_pruned_base(
    settings: ModelSettings,
    structure: ModelStructure,
    *,
    root: Path,
    seed: int,
    labels: Sequence[str] = (),
    moments: Tensors | None = None,
) -> PrunedBase:
    """Load a base at its pruned widths; the memory it takes is that of the smaller model and of one tensor.

    A head that the checkpoint lacks is drawn as `base.load` draws it. Never runs code that came with a checkpoint.

    Args:
        settings: the recipe's table `model`.
        structure: the heads and channels that stay, in the base's coordinates.
        root: folder that relative paths are relative to.
        seed: the run's seed.
        labels: names of the classes, for classification.
        moments: by which layers are repaired; none: they are not.

    Raises:
        ConfigError: if the model or device does not exist, weights are missing, or the model cannot be pruned.
        ShapeError: if the structure is not one of this base, or a tensor is not as its config says.
    """
    device, dtype = choose_device(settings.device), DTYPES[number_format(settings)]
    path = locate(settings, root)
    check_folder(settings, path)
    try:
        path = readable(path, settings.revision)
        config, classes = read_config(path, settings, labels)
        model = skeleton(config, task=settings.task, dtype=dtype)
        layout = layout_of(model)
        expected, first_names = state_of(model), aliases(model)
        slices = cuts(check(structure, layout), layout)
        shrink(model, structure, layout)
        readers = tensor_readers(checkpoint_files(path, settings.revision))
        readers = match_names(readers, expected.keys(), model.base_model_prefix)
        if not classes.fits:  # the head is of other classes
            head = output_layer(model)
            readers = {name: read for name, read in readers.items() if name.rpartition(".")[0] != head}
        shifts: dict[str, torch.Tensor] = {}

        def take(first: str, name: str, tensor: torch.Tensor) -> None:
            # A clone: a tensor that was only read lies in the file's pages, and goes with them.
            part, module = slice_tensor(model, name, tensor, slices).clone(), first.removesuffix(".weight")
            if first != module and (repaired := repair_tensor(model, module, tensor, moments or {}, slices)):
                part, shifts[module] = repaired
            place(model, first, part.to(device))

        filled = fill(model, expected, readers, take, first_names=first_names)
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        raise not_found(settings, error) from error
    # Afterwards: a bias may be read before the weight, or be none of the checkpoint's.
    for module, shift in shifts.items():
        add_to_bias(model, module, shift.to(device))
    check_complete(settings, model, filled.missing)
    finish(model, filled.new, key=derive(seed, "model.head"), device=device)
    set_generation_config(model, path, settings.revision)
    refuse_static_caches(model)
    return PrunedBase(model=model, new=filled.missing, digest=filled.digest)


def layout_from_config(settings: ModelSettings, *, root: Path) -> BlockLayout:
    """Return the blocks of a base from its config alone, without reading a weight.

    Raises:
        ConfigError: if there is no such base, or it cannot be pruned.
    """
    path = locate(settings, root)
    check_folder(settings, path)
    try:
        # One class will do: the head is no part of the blocks.
        config, _ = read_config(readable(path, settings.revision), settings, ("",))
        model = skeleton(config, task=settings.task, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise not_found(settings, error) from error
    return layout_of(model)


def shrink(model: Any, structure: ModelStructure, layout: BlockLayout) -> None:
    """Give every block of a skeleton its own widths, in place."""
    for name, part in cuts(check(structure, layout), layout).items():
        cut_linear(model.get_submodule(name), slice_index(part))
    fit(model, structure, layout)


def slice_tensor(model: Any, name: str, tensor: torch.Tensor, slices: Mapping[str, LayerSlice]) -> torch.Tensor:
    """Return the part of a parameter of the base, by its full name, that the pruned model keeps."""
    module, _, leaf = name.rpartition(".")
    part = slice_index(slices.get(module, FULL))
    return part.rows(tensor) if leaf == "bias" else part.weight(model.get_submodule(module))(tensor)


def repair_tensor(
    model: Any, module: str, whole: torch.Tensor, moments: Tensors, slices: Mapping[str, LayerSlice]
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a layer's repaired weight, as the layer stores it, and what its bias grows by; None without a repair."""
    own, cut = layer_moments(moments, module), slices.get(module, FULL)
    if not own or cut.into is None:
        return None
    transposed = isinstance(model.get_submodule(module), Conv1D)
    parameters = repair_layer(whole.T if transposed else whole, None, own, cut.into)
    if parameters is None:
        return None
    return (parameters[0].T if transposed else parameters[0]).contiguous(), parameters[1]


def add_to_bias(model: Any, module: str, shift: torch.Tensor) -> None:
    """Add to a layer's bias; a layer without one gets one."""
    before = model.get_submodule(module).bias
    place(model, f"{module}.bias", shift if before is None else (before.double() + shift.double()).to(shift.dtype))
