"""Virtual tokens on disk in PEFT's format: prompt tuning, P-tuning and prefix tuning, as `PeftModel` loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from fedtune.errors import ShapeError
from fedtune.lora.virtual_tokens import (
    encode,
    flatten_prefix,
    full_names,
    has_encoder,
    num_layers,
    own_names,
    unflatten_prefix,
)
from fedtune.tensors import Array, Tensors

PROMPT, ENCODED, PREFIX = "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"
"""PEFT's names of the kinds: embeddings, embeddings of an encoder, keys and values."""
TYPES = (PROMPT, ENCODED, PREFIX)
KEY = "prompt_embeddings"
"""PEFT's name of the one tensor in its file: of P-tuning what the encoder gives, without the encoder."""
ENCODER = "encoder.safetensors"
"""P-tuning's encoder and what it reads, which PEFT does not store: a run that starts from the folder trains them on."""


def config(saved: Tensors) -> Mapping[str, Any]:
    """Return what adapter_config.json says of virtual tokens, beside their base."""
    own = own_names(saved)
    first = next(iter(own.values())) if num_layers(own) else own["embedding"]
    usual = {
        "num_virtual_tokens": len(first),
        "token_dim": int(np.prod(first.shape[1:])),
        "num_transformer_submodules": 1,
        "num_attention_heads": None,
        "num_layers": None,
        "modules_to_save": None,
        "inference_mode": True,
    }
    if num_layers(own):
        heads = {"num_attention_heads": first.shape[1], "num_layers": num_layers(own)}
        return {"peft_type": PREFIX, **usual, **heads, "encoder_hidden_size": None, "prefix_projection": False}
    if has_encoder(own):
        hidden = len(own["encoder.0.bias"])
        layers = {"encoder_reparameterization_type": "MLP", "encoder_hidden_size": hidden, "encoder_num_layers": 2}
        return {"peft_type": ENCODED, **usual, **layers, "encoder_dropout": 0.0}
    return {"peft_type": PROMPT, **usual, "prompt_tuning_init": "RANDOM"}


def put(folder: Path, weights: str, saved: Tensors) -> None:
    """Write virtual tokens into a folder, into a file of this name, and an encoder beside it."""
    own = {name: np.ascontiguousarray(array, np.float32) for name, array in own_names(saved).items()}
    flat = flatten_prefix(own) if num_layers(own) else encode(own)
    save_file({KEY: flat}, folder / weights, metadata={"format": "pt"})
    if has_encoder(own):
        save_file(own, folder / ENCODER, metadata={"format": "pt"})


def virtual_tokens(config: Mapping[str, Any], tensors: Tensors, encoder: Tensors) -> Tensors:
    """Return the virtual tokens of a folder, by parameter name.

    Args:
        config: adapter_config.json.
        tensors: of the file of weights.
        encoder: of the file beside it; empty where there is none.

    Raises:
        ShapeError: if the tensors are not those that the configuration describes.
    """
    kind, count = config.get("peft_type"), config.get("num_virtual_tokens")
    if list(tensors) != [KEY] or tensors[KEY].ndim != 2 or len(tensors[KEY]) != count:
        got = ", ".join(f"{name} {array.shape}" for name, array in sorted(tensors.items())[:3]) or "none"
        raise ShapeError(f"{KEY}: expected it alone, with a row for each of {count} virtual tokens; got {got}")
    flat = tensors[KEY]
    if kind == PREFIX:
        layers, heads = config.get("num_layers"), config.get("num_attention_heads")
        if config.get("prefix_projection") or type(layers) is not int or type(heads) is not int:
            got = f"{layers!r} and {heads!r}, prefix_projection = {config.get('prefix_projection')!r}"
            raise ShapeError(f"prefix: expected num_layers and num_attention_heads, without a projection; got {got}")
        return full_names(unflatten_prefix(flat, layers, heads))
    if encoder:
        return full_names(checked_encoder(encoder, flat))
    return full_names({"embedding": flat})


def checked_encoder(own: Tensors, flat: Array) -> Tensors:
    """Return an encoder whose embeddings are those beside it.

    Raises:
        ShapeError: if it gives others, or is none.
    """
    try:
        given = encode(own)
    except (KeyError, ValueError) as error:
        raise ShapeError(f"{ENCODER}: expected P-tuning's encoder; got {sorted(own)[:3]}: {error}") from error
    if not has_encoder(own) or given.shape != flat.shape or not np.allclose(given, flat, rtol=1e-4, atol=1e-5):
        raise ShapeError(f"{ENCODER}: expected the encoder that gives {KEY}; got another; put back a copy of both")
    return own
