"""A base quantised as it is read: the peak of memory is the quantised model and the largest tensor of the file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fedtune.directions.seed_ledger import TensorEntry
from fedtune.errors import ConfigError, Fault
from fedtune.model.classes import Classes, output_layer
from fedtune.model.device import DTYPES, choose_device
from fedtune.model.load_checks import is_finite, lacking_body
from fedtune.model.quantised_layers import describe_weight, quantisable, quantise_layer
from fedtune.model.quantised_linear import choose_kernels
from fedtune.model.settings import AdapterSettings, ModelSettings, quantised_format, without_quantisation
from fedtune.model.skeleton import (
    TensorReaders,
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
from fedtune.model.targets import find_saved
from fedtune.seeds import derive


@dataclass(frozen=True)
class Streamed:
    """A model that was quantised as it was read."""

    model: Any
    """transformers.PreTrainedModel on the CPU."""
    new: Sequence[str]
    """Names of the tensors that are drawn anew."""
    given: Sequence[str]
    """Names of those that the checkpoint lacks altogether."""
    digest: str
    """Of the base before it was quantised."""
    entries: Mapping[str, TensorEntry]
    """Of the weights that were quantised, as the manifest lists them."""


def stream_quantised(
    settings: ModelSettings, adapter: AdapterSettings, source: str | Path, config: Any, classes: Classes, *, seed: int
) -> Streamed | None:
    """Return a base quantised tensor by tensor; None where none is quantised, or its file has other names.

    Files whose tensors transformers joins or splits, such as stacked experts, are read whole and quantised then.

    Raises:
        ConfigError: naming a tensor that is not finite.
        ShapeError: if a tensor is not as the config says.
    """
    if (kind := quantised_format(settings.dtype)) is None:
        return None
    kernels = choose_kernels(settings.kernels, kind, choose_device(settings.device))
    model = skeleton(config, task=settings.task, dtype=DTYPES[without_quantisation(settings).dtype])
    expected, first_names = state_of(model), aliases(model)
    readers = match_names(
        tensor_readers(checkpoint_files(source, settings.revision)), expected.keys(), model.base_model_prefix
    )
    given = without_reader(expected, readers, first_names)
    if lacking_body(settings, model, given):
        return None
    if settings.task == "classification" and not classes.fits:  # the head is of other classes
        head = output_layer(model)
        readers = {name: read for name, read in readers.items() if name.rpartition(".")[0] != head}
    new = without_reader(expected, readers, first_names)
    # A head that is drawn anew is trained in full, and stays as it is.
    chosen = set(quantisable(model, find_saved(model, adapter.modules_to_save, new, task=settings.task)))
    entries = dict[str, TensorEntry]()

    def take(first: str, name: str, tensor: torch.Tensor) -> None:
        if not is_finite(tensor):
            got = f"NaN or infinity in {name} of {settings.base}"
            raise ConfigError(Fault("model.base", "finite weights", got, "download it again, or choose another base"))
        module, _, leaf = first.rpartition(".")
        if module in chosen and leaf == "weight":
            entries[first] = describe_weight(first, tensor)
            quantise_layer(model, module, tensor, kind, kernels=kernels)
        else:
            # A clone: a tensor that was only read lies in the file's pages, and goes with them.
            place(model, first, tensor.clone())

    filled = fill(model, expected, readers, take, first_names=first_names)
    finish(model, filled.new, key=derive(seed, "model.head"), device=torch.device("cpu"))
    set_generation_config(model, source, settings.revision)
    return Streamed(model, filled.missing, given, filled.digest, entries)


def without_reader(expected: Collection[str], readers: TensorReaders, first_names: Mapping[str, str]) -> Sequence[str]:
    """Return the tensors that a checkpoint has under none of their names."""
    there = {first_names[name] for name in expected if name in readers}
    return sorted(name for name in expected if first_names[name] not in there)
