"""A model without memory, filled from the files of a checkpoint one tensor at a time."""

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
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
)
from transformers.utils import cached_file

from fedtune.errors import ShapeError
from fedtune.model.libraries import quiet
from fedtune.model.torch_seed import torch_seed

TensorReaders = Mapping[str, Callable[[], torch.Tensor]]
"""A function that reads one tensor of a checkpoint, by the tensor's name there."""


PlaceTensor = Callable[[str, str, torch.Tensor], None]
"""Takes a tensor up: the first of its names, the one that it is listed by, and its numbers, which go afterwards."""


@dataclass(frozen=True)
class Filled:
    """What a checkpoint held of a model."""

    digest: str
    """Of the whole base, as `base.digest` gives it."""
    new: Sequence[str]
    """Names of the tensors that it lacks."""
    missing: Sequence[str]
    """Those of them without which transformers does not load the model."""


def fill(
    model: Any,
    expected: Mapping[str, tuple[torch.Size, torch.dtype]],
    readers: TensorReaders,
    take: PlaceTensor,
    *,
    first_names: Mapping[str, str],
) -> Filled:
    """Read all tensors of a model from its checkpoint, one at a time, and hand each on once.

    Args:
        model: a skeleton.
        expected: shape and number format of the tensors of its state dict.
        readers: by the model's names.
        take: takes each tensor up.
        first_names: from `aliases`, before the skeleton was changed.

    Raises:
        ShapeError: if a tensor is not as its config says.
    """
    # What transformers lets a checkpoint lack, such as tensors that are computed.
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    sha, new, placed = hashlib.sha256(), list[str](), set[str]()
    # In the order of `base.digest` and over whole tensors: both must give the same digest of the same base.
    for name, (shape, kind) in sorted(expected.items()):
        first = first_names[name]
        read = next((readers[other] for other in expected if first_names[other] == first and other in readers), None)
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
            take(first, name, tensor)
        # Else it would still be in memory when the next tensor is read.
        del tensor
    missing = [name for name in new if not any(re.search(pattern, name) for pattern in optional)]
    return Filled(sha.hexdigest(), new, missing)


def state_of(model: Any) -> Mapping[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and number format of every tensor that a checkpoint of a model holds."""
    return {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}


def skeleton(config: Any, *, task: str, dtype: torch.dtype) -> Any:
    """Return a stock model without memory for its tensors: they are on the meta device."""
    auto = AutoModelForSequenceClassification if task == "classification" else AutoModelForCausalLM
    with quiet(), torch.device("meta"):
        model = auto.from_config(config, dtype=dtype, trust_remote_code=False)
    return model.requires_grad_(False).eval()


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
