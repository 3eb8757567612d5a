"""A base without its weights: its layers and sizes, from config.json and the headers of its safetensors alone."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fedtune.errors import ConfigError
from fedtune.model.base import LOAD_ERRORS, Base, parameters_of, targets_of
from fedtune.model.base_config import auto_class, read_config
from fedtune.model.base_files import check_folder, has_weights, locate, not_found, readable
from fedtune.model.blocks import block_numbers
from fedtune.model.device import DTYPES, number_format
from fedtune.model.emulator_facts import resolve_layers
from fedtune.model.libraries import quiet
from fedtune.model.load_checks import embedding_rows, padding_token
from fedtune.model.pooling import choose_pooling, set_pooling
from fedtune.model.settings import AdapterSettings, ModelSettings, without_quantisation
from fedtune.model.surgery import layout_of
from fedtune.model.targets import find_saved
from fedtune.model.virtual_tokens import draw_virtual_tokens


def sized_base(
    settings: ModelSettings,
    adapter: AdapterSettings,
    *,
    tokenizer: Any,
    root: Path,
    seed: int,
    labels: Sequence[str] = (),
) -> Base:
    """Return a base whose tensors have shapes and no numbers, as `base.load` would return it with both.

    It has no digest, and its layers are those of the number format outside of quantised ones.

    Raises:
        ConfigError: if the model or a target module does not exist.
    """
    path = locate(settings, root)
    check_folder(settings, path, weights=False)
    settings = replace(settings, dtype=number_format(settings))
    outside = DTYPES[without_quantisation(settings).dtype]
    try:
        source = readable(path, settings.revision)
        config, _ = read_config(source, settings, labels)
        with quiet(), torch.device("meta"):
            model = auto_class(settings.task).from_config(config, dtype=outside)
        embedding_rows(model)  # fails for models that read characters
        set_pooling(model, choose_pooling(settings, config, source))
    except LOAD_ERRORS as error:
        raise not_found(settings, error) from error
    model.config.pad_token_id = padding_token(model, tokenizer)
    model.requires_grad_(False).eval()
    new = missing_names(model, Path(source))
    saved_modules = find_saved(model, adapter.modules_to_save, new, task=settings.task)
    for name in saved_modules:
        model.get_submodule(name).float()
    layers = resolve_layers(adapter.layers, path, blocks=block_numbers(model))
    virtual = draw_virtual_tokens(adapter, model, tokenizer, seed=seed)
    folder = Path(path)
    bare = folder.is_dir() and not has_weights(folder)
    known = False
    with suppress(ConfigError):  # another family: whether its logits are plain products cannot be asked here
        known = bool(layout_of(model).blocks)
    return Base(
        name=settings.base,
        path=str(path),
        model=model,
        tokenizer=tokenizer,
        task=settings.task,
        device=torch.device("cpu"),
        digest="",
        modules={} if virtual else targets_of(adapter, model, saved_modules, layers),
        saved_modules=saved_modules,
        saved=sorted(virtual.initial) if virtual else parameters_of(model, saved_modules),
        dtype=settings.dtype,
        fused=settings.task == "causal" and known,
        virtual=virtual,
        notes=[f"model.base: no weights in {path} yet; its sizes are those of config.json"] if bare else (),
    )


def missing_names(model: Any, folder: Path) -> Sequence[str]:
    """Return the parameters of a model that its checkpoint lacks; none where there is no folder to look into."""
    stored = stored_names(folder)
    if not stored:
        return ()
    prefix = f"{model.base_model_prefix}."
    # A checkpoint of the bare model names its tensors without the prefix, or with that of another head.
    bare = {name.removeprefix(prefix) for name in stored}
    names = [name for name, _ in model.named_parameters()]
    return [name for name in names if name not in stored and name.removeprefix(prefix) not in bare]


def stored_names(folder: Path) -> Collection[str]:
    """Return the names of the tensors in a folder's safetensors, from their headers."""
    names = set[str]()
    for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            names |= json.loads(opened.read(length)).keys() - {"__metadata__"}
    return names
