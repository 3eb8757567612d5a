"""A base read from its checkpoint at its pruned widths, one tensor at a time: the whole base is never in memory."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)
from transformers.utils import cached_file

from fedtune.errors import ShapeError
from fedtune.model.base_config import read_config
from fedtune.model.base_files import check_folder, locate, not_found, readable
from fedtune.model.classes import output_layer
from fedtune.model.device import DTYPES, choose_device, number_format
from fedtune.model.libraries import quiet
from fedtune.model.load_checks import check_complete
from fedtune.model.settings import ModelSettings
from fedtune.model.surgery import cut_linear, fit, layout_of, refuse_static_caches, slice_index
from fedtune.model.torch_seed import torch_seed
from fedtune.pruning.structure import FULL, BlockLayout, LayerSlice, ModelStructure, check, cuts
from fedtune.seeds import derive

TensorReaders = Mapping[str, Callable[[], torch.Tensor]]
"""A function that reads one tensor of a checkpoint, by the tensor's name there."""


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
    settings: ModelSettings, structure: ModelStructure, *, root: Path, seed: int, labels: Sequence[str] = ()
) -> PrunedBase:
    """Load a base at its pruned widths; the memory it takes is that of the smaller model and of one tensor.

    A head that the checkpoint lacks is drawn as `base.load` draws it. Never runs code that came with a checkpoint.

    Args:
        settings: the recipe's table `model`.
        structure: the heads and channels that stay, in the base's coordinates.
        root: folder that relative paths are relative to.
        seed: the run's seed.
        labels: names of the classes, for classification.

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
        expected = {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        first_names, slices = aliases(model), cuts(check(structure, layout), layout)
        shrink(model, structure, layout)
        # What transformers lets a checkpoint lack, such as tensors that are computed.
        optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
        readers = tensor_readers(checkpoint_files(path, settings.revision))
        readers = match_names(readers, expected.keys(), model.base_model_prefix)
        if not classes.fits:  # the head is of other classes
            head = output_layer(model)
            readers = {name: read for name, read in readers.items() if name.rpartition(".")[0] != head}
        sha, new, placed = hashlib.sha256(), [], set()
        # In the order of `base.digest` and over whole tensors: both must give the same digest of the same base.
        for name, (shape, kind) in sorted(expected.items()):
            first = first_names[name]
            read = next(
                (readers[other] for other in expected if first_names[other] == first and other in readers), None
            )
            if read is None:
                new.append(name)
                continue
            tensor = read()
            # A file may hold anything; slicing by the config's widths would take the wrong rows without a word.
            if tensor.shape != shape:
                raise ShapeError(f"{name}: expected {tuple(shape)}, as the config says; got {tuple(tensor.shape)}")
            tensor = tensor.to(kind)
            sha.update(f"{name}\0{kind}\0{tuple(shape)}\0".encode())
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)  # no copy
            if first not in placed:
                placed.add(first)
                # A clone: a tensor that was only read lies in the file's pages, and goes with them.
                place(model, first, slice_tensor(model, name, tensor, slices).clone().to(device))
            # Else it would still be in memory when the next tensor is read.
            del tensor
    except (OSError, ValueError, RuntimeError, SafetensorError, KeyError) as error:
        raise not_found(settings, error) from error
    missing = [name for name in new if not any(re.search(pattern, name) for pattern in optional)]
    check_complete(settings, model, missing)
    finish(model, new, key=derive(seed, "model.head"), device=device)
    set_generation_config(model, path, settings.revision)
    refuse_static_caches(model)
    return PrunedBase(model=model, new=missing, digest=sha.hexdigest())


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


def skeleton(config: Any, *, task: str, dtype: torch.dtype) -> Any:
    """Return a stock model without memory for its tensors: they are on the meta device."""
    auto = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    with quiet(), torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.requires_grad_(False).eval()


def shrink(model: Any, structure: ModelStructure, layout: BlockLayout) -> None:
    """Give every block of a skeleton its own widths, in place."""
    for name, part in cuts(check(structure, layout), layout).items():
        cut_linear(model.get_submodule(name), slice_index(part))
    fit(model, structure, layout)


def tensor_readers(files: Sequence[Path]) -> TensorReaders:
    """Return a function for each tensor of safetensors files that reads it."""

    # The file is opened for every tensor anew: the pages of a file that stays open stay in memory with it.
    def read(file: Path, key: str) -> torch.Tensor:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(key)
            return tensor

    readers: dict[str, Callable[[], torch.Tensor]] = {}
    for file in files:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            readers |= {key: partial(read, file, key) for key in tensors.keys()}  # noqa: SIM118
    return readers


def checkpoint_files(path: str | Path, revision: str | None) -> Sequence[Path]:
    """Return the safetensors files of a folder or hub model: a single file, or those that its index names.

    Raises:
        OSError: if there is neither.
    """
    locate_file = partial(cached_file, str(path), revision=revision)
    if single := locate_file("model.safetensors", _raise_exceptions_for_missing_entries=False):
        return [Path(single)]
    index = json.loads(Path(locate_file("model.safetensors.index.json")).read_text())
    # The last part of the name alone: an index must not name files outside of its folder.
    return [Path(locate_file(Path(name).name)) for name in sorted(set(index["weight_map"].values()))]


def match_names(readers: TensorReaders, expected: Collection[str], prefix: str) -> TensorReaders:
    """Return a checkpoint's tensors by the names that the model has for them.

    As transformers does it: a bare model's checkpoint fits one with a head, and the other way round, and what early
    checkpoints call gamma and beta are a norm's weight and bias.
    """
    matched = {}
    for key, read in readers.items():
        name = key.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
        choices = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        matched[next((choice for choice in choices if choice in expected), name)] = read
    return matched


def aliases(model: Any) -> Mapping[str, str]:
    """Return the first name of every tensor of a model by all of its names; tied tensors have several."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}


def slice_tensor(model: Any, name: str, tensor: torch.Tensor, slices: Mapping[str, LayerSlice]) -> torch.Tensor:
    """Return the part of a parameter of the base, by its full name, that the pruned model keeps."""
    module, _, leaf = name.rpartition(".")
    part = slice_index(slices.get(module, FULL))
    return part.rows(tensor) if leaf == "bias" else part.weight(model.get_submodule(module))(tensor)


def place(model: Any, name: str, tensor: torch.Tensor) -> None:
    """Put a tensor where a skeleton has a parameter or buffer of this name."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        tensor = nn.Parameter(tensor, requires_grad=False)
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers draws what lacks this mark
    setattr(module, leaf, tensor)


def finish(model: Any, new: Collection[str], *, key: int, device: torch.device) -> Any:
    """Give a filled skeleton what no checkpoint holds: tied names, buffers, and a new head drawn by the key."""
    for name in new:
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        setattr(module, leaf, nn.Parameter(torch.empty_like(getattr(module, leaf), device="cpu"), requires_grad=False))
    model.tie_weights()
    # Such buffers, like rotary frequencies, are computed and not stored; `initialize_weights` writes them.
    for name, buffer in list(model.named_non_persistent_buffers()):
        place(model, name, torch.empty_like(buffer, device="cpu"))
    with quiet(), torch_seed(key, torch.device("cpu")):
        model.initialize_weights()
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, left
    return model.to(device)


def set_generation_config(model: Any, path: str | Path, revision: str | None = None) -> None:
    """Give a model that can generate the checkpoint's own settings of generation, if it has any."""
    file = cached_file(
        str(path), "generation_config.json", revision=revision, _raise_exceptions_for_missing_entries=False
    )
    if file is not None and model.can_generate():
        model.generation_config = GenerationConfig.from_pretrained(path, revision=revision)
