"""Checks of a base that is loaded: whole, finite, blind to the future, and with rows for every token."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from fedtune.errors import ConfigError, Fault
from fedtune.model.base_files import not_found
from fedtune.model.classes import head_modules
from fedtune.model.settings import ModelSettings

PROBE_TOKENS, CHANGED_TOKENS = 12, 4
"""Length of the text that the causal probe reads twice, and how many tokens at its end differ."""


def check_complete(settings: ModelSettings, model: Any, new: Sequence[str]) -> None:
    """Refuse a checkpoint without tensors of the model: a head may be new, random layers of its body may not.

    Raises:
        ConfigError: naming the tensors.
    """
    if parts := lacking_body(settings, model, new):
        lacking = ", ".join(sorted(parts)[:6])
        raise not_found(settings, ValueError(f"it lacks {len(parts)} of the model's tensors: {lacking}"))


def lacking_body(settings: ModelSettings, model: Any, new: Sequence[str]) -> Collection[str]:
    """Return which of the tensors that a checkpoint lacks are of the model's body, and not of a head."""
    heads = head_modules(model) if settings.task == "classification" else []
    optional = getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    # An encoder that was trained to fill gaps has no pooler; that too is a part of the head.
    return {
        name
        for name in new
        if name.partition(".")[0] not in heads
        and not (heads and ".pooler." in name)
        and not any(re.search(pattern, name) for pattern in optional)
    }


def check_finite(settings: ModelSettings, model: nn.Module) -> None:
    """Refuse weights that are not finite, which every client's training would end in.

    Raises:
        ConfigError: naming the tensors.
    """
    broken = [name for name, parameter in model.named_parameters() if not is_finite(parameter)]
    if broken:
        got = f"NaN or infinity in {', '.join(broken[:3])}{' and others' * (len(broken) > 3)} of {settings.base}"
        raise ConfigError(Fault("model.base", "finite weights", got, "download it again, or choose another base"))


@torch.no_grad()
def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether all numbers of a tensor are finite; without a copy of it."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.itemsize < 2:
        return True
    # NaN passes through both.
    lowest, highest = torch.aminmax(tensor)
    return bool(torch.isfinite(lowest) and torch.isfinite(highest))


def embedding_rows(model: Any) -> int:
    """Return the number of tokens that a model has an embedding for."""
    return int(model.get_input_embeddings().weight.shape[0])


def padding_token(model: Any, tokenizer: Any) -> int:
    """Return the token that pads short rows: the first of the usual ones that the model has an embedding for."""
    choices = (model.config.pad_token_id, tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(choice for choice in choices if choice is not None and 0 <= choice < embedding_rows(model))


def table_positions(model: Any) -> int | None:
    """Return the positions that a model's table of them has rows for; None without a table.

    Models like RoBERTa count from the row after the padding token's, and so have fewer than their config says.
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "position_embeddings" and isinstance(module, nn.Embedding):
            first = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - first
    return None


def longest_input(model: Any, tokenizer: Any) -> int:
    """Return the smaller limit of a model and its tokenizer in tokens; 2^31 if neither names one."""
    # transformers gives a tokenizer without a limit one of 1e30, which no range or tensor can have.
    named = table_positions(model) or getattr(model.config, "max_position_embeddings", None) or 0
    # Some models without a limit, such as XLNet, name one of -1.
    return min(named if named > 0 else 2**31, int(getattr(tokenizer, "model_max_length", None) or 2**31))


@torch.no_grad()
def packs(model: Any, positions: int) -> bool:
    """Return whether two texts in one row, whose positions start anew, are read as each is alone.

    Not by models that remember a state, that find places by a mask, or whose table of positions goes by the row.
    """
    rows, length = embedding_rows(model), min(PROBE_TOKENS, positions // 2)
    if length < 2:
        return False
    device = model.get_input_embeddings().weight.device
    first = (rows // 2 + torch.arange(length, device=device))[None] % rows
    second = (rows // 3 + torch.arange(length - 1, device=device))[None] % rows
    places = torch.cat([torch.arange(length, device=device), torch.arange(length - 1, device=device)])[None]
    try:
        together = model(input_ids=torch.cat([first, second], 1), position_ids=places, use_cache=False).logits.float()
        alone = torch.cat([model(input_ids=ids, use_cache=False).logits.float() for ids in (first, second)], 1)
        apart = model(input_ids=torch.cat([first, second], 1), use_cache=False).logits.float()
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
        return False
    # Against how far the second text moves where it does see the first.
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    return bool((together - alone).abs().max() <= tolerance * (apart - alone).abs().max())


@torch.inference_mode()
def check_causal(settings: ModelSettings, model: Any, positions: int) -> None:
    """Refuse a model whose output at a token changes with later ones: its loss would be that of copying.

    Two texts that differ in their last tokens are read at once; what is said of the tokens before must be the same.

    Raises:
        ConfigError: naming the model; also one that cannot read a text at all.
    """
    rows, length = embedding_rows(model), min(PROBE_TOKENS, positions)
    changed = min(CHANGED_TOKENS, length - 1)
    if changed < 1 or rows < 4:
        return
    device = model.get_input_embeddings().weight.device
    # From the middle of the table: the first tokens are often special ones, which some models mask.
    ids = (rows // 2 + torch.arange(length, device=device)) % rows
    other = ids.clone()
    other[-changed:] = (ids[-changed:] + rows // 3 + 1) % rows
    pair = torch.stack([ids, other])
    try:
        logits = model(input_ids=pair, attention_mask=torch.ones_like(pair), use_cache=False).logits.float()
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
        expected, got = "a model that reads a text", f"{settings.base} ({model.config.model_type}) with {reason}"
        hint = "check its config.json, or choose another base"
        raise ConfigError(Fault("model.base", expected, got, hint)) from error
    # Of the places before the change, against the places of it.
    moved = (logits[0] - logits[1]).abs().amax(-1)
    # The two rows of one batch are rounded alike, but for the order in which a kernel may add.
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    if moved[:-changed].max() > tolerance * moved[-changed:].max():
        expected = "a causal model, in which no token sees a later one"
        got = f"{settings.base} ({model.config.model_type}), whose outputs change with later tokens"
        hint = 'choose a decoder, or set model.task = "classification"'
        raise ConfigError(Fault("model.base", expected, got, hint))
