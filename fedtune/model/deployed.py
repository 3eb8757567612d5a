"""Loading a pruned model from the folder that the export wrote: the stock class with blocks of their own widths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import CONFIG_MAPPING

from fedtune.errors import ConfigError, Fault, ShapeError
from fedtune.model.checkpoint import shrink
from fedtune.model.device import DTYPES
from fedtune.model.pruned_export import FORMAT, PREFIX
from fedtune.model.skeleton import aliases, finish, place, set_generation_config, skeleton, tensor_readers
from fedtune.model.surgery import layout_of, refuse_static_caches
from fedtune.pruning.least_squares import input_widths
from fedtune.pruning.structure import FAMILIES, Block, BlockStructure, ModelStructure

TASKS = ("causal", "classification")
CODE_KEYS = ("auto_map", "quantization_config", "implementation")
"""Ends of the keys of a config that may name code to fetch; they are left out, so that a folder chooses none."""
DAMAGE_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    ArithmeticError,
    ImportError,
    RuntimeError,
    ShapeError,
    SafetensorError,
    StrictDataclassError,
)
"""The errors that reading a folder may end in whose files are not as we write them."""


def load(folder: Path, *, dtype: str, device: torch.device) -> Any:
    """Return the pruned model that `pruned_export.write` wrote, in eval mode on a device.

    Reads one tensor at a time, and runs no code that lies in the folder.

    Raises:
        ConfigError: naming the file, if the folder was not written by fedtune, or is damaged.
    """
    try:
        data = json.loads((folder / "config.json").read_text())
        described = data.pop("fedtune_pruning")
        family = str(data["model_type"]).removeprefix(PREFIX)
        if family not in FAMILIES or described["format"] != FORMAT:
            raise ValueError(f"model_type {data['model_type']!r}, format {described['format']!r}")
        if described.get("manifest") and not (folder / "fedtune.json").is_file():
            raise ValueError("its manifest, fedtune.json, is missing")
        if described["task"] not in TASKS:
            raise ValueError(f"task {described['task']!r}")
        # trust_remote_code=False covers `auto_map`, but not attention kernels of a hub, nor quantisers.
        plain = {key: value for key, value in data.items() if not key.endswith(CODE_KEYS)}
        config = CONFIG_MAPPING[family].from_dict({**plain, "model_type": family})
        model = skeleton(config, task=described["task"], dtype=DTYPES[dtype])
        layout = layout_of(model)
        blocks = zip(layout.blocks, described["blocks"], strict=True)
        shrink(model, ModelStructure(tuple(leading_units(block, **counts) for block, counts in blocks)), layout)
        for name in described.get("biases", ()):
            if name not in input_widths(layout):
                raise ValueError(f"a bias of {str(name)[:80]!r}, which is no layer that is repaired")
            # As wide as the residual stream: no layer that reads heads or channels loses outputs.
            empty = torch.empty(layout.width, dtype=DTYPES[dtype], device="meta")
            model.get_submodule(name).bias = torch.nn.Parameter(empty, requires_grad=False)
        first_names, expected = aliases(model), model.state_dict()
        readers = tensor_readers([folder / "model.safetensors"])
        # Neither more nor less: a missing tensor would stay on the meta device, an extra one be ignored in silence.
        if readers.keys() != set(first_names.values()):
            strange = sorted(readers.keys() ^ set(first_names.values()))
            raise ValueError(f"its tensors are not those of the config: {', '.join(strange[:3])}")
        for name, read in readers.items():
            tensor = read()
            if tensor.shape != expected[name].shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, not {tuple(expected[name].shape)}")
            # A copy even where format and device agree: what was read lies in the file's pages.
            place(model, name, tensor.to(device, expected[name].dtype, copy=True))
        finish(model, (), key=0, device=device)  # draws nothing: no parameter is new
        set_generation_config(model, folder)
    except DAMAGE_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        expected_folder = "a folder of a pruned model as fedtune exports it"
        raise ConfigError(
            Fault(str(folder), expected_folder, f"{type(error).__name__}: {reason}", "export it again")
        ) from error
    refuse_static_caches(model)
    return model


def leading_units(block: Block, *, heads: int, kv_heads: int, channels: int) -> BlockStructure:
    """Return a structure of these sizes: a folder holds no indices, and on a skeleton any of them will do.

    Raises:
        ShapeError: if the block is not that wide, or key/value heads would have unequal shares of the query heads.
    """
    if not (0 <= heads <= block.heads and 0 <= kv_heads <= block.kv_heads and 0 <= channels <= block.channels):
        widest = f"{block.heads}, {block.kv_heads} and {block.channels}"
        raise ShapeError(f"{block.prefix}: expected at most {widest} wide; got {heads}, {kv_heads}, {channels}")
    share = heads // max(1, kv_heads)
    q = tuple(kv * block.group + i for kv in range(kv_heads) for i in range(share))
    if len(q) != heads or share > block.group:
        raise ShapeError(f"{block.prefix}: expected as many heads for every key/value head; got {heads} and {kv_heads}")
    return BlockStructure(q=q, kv=tuple(range(kv_heads)), ff=tuple(range(channels)))
