"""Virtual tokens before every text: embeddings, or keys and values of each layer, trained while the base is frozen."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear
from transformers import DynamicCache

from fedtune.errors import ConfigError, Fault
from fedtune.lora.virtual_tokens import ENCODER_LAYERS, MODULE, SIDES, encode, full_names, has_encoder, own_names
from fedtune.model.load_checks import longest_input
from fedtune.model.settings import AdapterSettings
from fedtune.seeds import derive, generator
from fedtune.tensors import Array, Tensors

CACHE_NAMES = ("cache", "past_key_values")
"""Of a body's argument for the keys and values of what was read before, the newest name first."""
PREFIX_SPREAD = 0.1
"""Standard deviation of the first keys and values of a prefix."""
LEAST_TEXT = 2
"""Places that are left for a text: a token, and the one that it predicts."""
AHEAD, BEHIND = 3, 5
"""Length of the text by which a base is tried: the part that is given as virtual tokens, and the rest."""
GRID = 2.0**-20
"""Step of an encoder's first values: sums of their products are exact in float64, on every machine alike."""


@dataclass(frozen=True)
class VirtualTokens:
    """Virtual tokens of a base: what kind they are, and what they start from."""

    kind: str
    """prefix | p-tuning | prompt"""
    count: int
    """Of each text."""
    initial: Tensors
    """By parameter name, float32; see `lora.virtual_tokens`."""


def draw_virtual_tokens(settings: AdapterSettings, model: Any, tokenizer: Any, *, seed: int) -> VirtualTokens | None:
    """Return the first virtual tokens of a run, the same on every machine; None for an adapter of factors.

    prompt: embeddings of the recipe's text, or of tokens drawn from the vocabulary. p-tuning: of normal numbers through
    an encoder of three layers, drawn as PEFT draws them; the encoder itself is left out where it does not train.
    prefix: normal numbers.

    Raises:
        ConfigError: if the model reads no virtual tokens of this kind.
    """
    if settings.kind == "lora":
        return None
    check_room(settings, longest_input(model, tokenizer))
    check_reads(settings, model)
    key, count = derive(seed, "adapter.virtual_tokens"), settings.tokens
    if settings.kind == "prefix":
        initial = draw_prefix(model, key, count)
    elif settings.kind == "p-tuning":
        width = embed(model, [0]).shape[1]
        initial = draw_encoder(key, count, width, settings.hidden or width)
        if settings.send == "embeddings":
            # Of numbers on a grid every sum is exact, in whatever order a machine adds: all sites start alike.
            initial = {"embedding": encode(initial, on_grid)}
    else:
        initial = {"embedding": embed(model, prompt_ids(settings, model, tokenizer, key))}
    return VirtualTokens(settings.kind, count, full_names(initial))


def prompt_ids(settings: AdapterSettings, model: Any, tokenizer: Any, key: int) -> Sequence[int]:
    """Return the tokens whose embeddings a prompt starts from: of the recipe's text, over and over, or drawn."""
    if settings.init_text is None:
        rows = int(model.get_input_embeddings().weight.shape[0])
        drawn: Sequence[int] = generator(key).integers(0, rows, settings.tokens).tolist()
        return drawn
    ids: Sequence[int] = tokenizer(settings.init_text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ConfigError(Fault("adapter.init_text", "a text of at least one token", repr(settings.init_text)))
    return [ids[place % len(ids)] for place in range(settings.tokens)]


@torch.no_grad()
def embed(model: Any, ids: Sequence[int]) -> Array:
    """Return the embeddings (tokens, width) of some tokens, float32; zeros of a model without weights."""
    table = model.get_input_embeddings()
    embedded = table(torch.tensor(ids, device=table.weight.device))
    if embedded.is_meta:
        return np.zeros(tuple(embedded.shape), np.float32)
    array: Array = embedded.float().cpu().numpy()
    return array


def draw_encoder(key: int, count: int, width: int, hidden: int) -> Tensors:
    """Return P-tuning's embeddings and encoder: normal numbers, and layers uniform in +-1/sqrt(in) as torch's are."""
    draws, sizes = generator(key), [(hidden, width), (hidden, hidden), (width, hidden)]
    tensors = {"embedding": on_grid(draws.standard_normal((count, width)))}
    for place, (m, n) in zip(ENCODER_LAYERS, sizes, strict=True):
        for name, shape in (("weight", (m, n)), ("bias", (m,))):
            tensors[f"encoder.{place}.{name}"] = on_grid(draws.uniform(-1.0, 1.0, shape) / np.sqrt(n))
    return tensors


def on_grid(array: Array) -> Array:
    """Return numbers rounded to the grid, float32, which has them exactly up to 16."""
    return (np.round(np.clip(array, -15.0, 15.0) / GRID) * GRID).astype(np.float32)


def draw_prefix(model: Any, key: int, count: int) -> Tensors:
    """Return a prefix's keys and values by layer, each (n, heads, width of a head)."""
    draws, (layers, heads, width) = generator(key), cache_shape(model)
    return {
        f"layers.{layer}.{side}": PREFIX_SPREAD * draws.standard_normal((count, heads, width), dtype=np.float32)
        for layer in range(layers)
        for side in SIDES
    }


def cache_shape(model: Any) -> tuple[int, int, int]:
    """Return layers, heads of keys and values, and the width of one, by a model's config."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(config.num_hidden_layers), int(heads), int(width)


@contextmanager
def with_virtual_tokens(model: Any, tokens: VirtualTokens, values: Tensors, *, trainable: bool) -> Iterator[None]:
    """Let a causal model read virtual tokens before every text inside the block, in training and in generation.

    Hidden states and logits are those of the text alone: losses and scores need not know of virtual tokens.
    """
    if not trainable and has_encoder(own_names(values)):
        # Once, and to the bit what an export holds.
        values = full_names({"embedding": encode(own_names(values))})
    part, body = tree(values, model.get_input_embeddings().weight.device, trainable=trainable), body_of(model)
    setattr(model, MODULE, part)
    plain = body.forward
    names = list(inspect.signature(plain).parameters)
    cache_name = next((name for name in CACHE_NAMES if name in names), "")

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        # transformers gives the cache another name from release to release: the last one that this body has.
        caches = [given.pop(name, None) for name in CACHE_NAMES]
        cache = next((cache for cache in caches if cache is not None), None)
        output = read(partial(call, plain, cache_name), given, cache, model, tokens)
        stores = given.get("use_cache") is not False or isinstance(output, tuple)
        if cache is None and tokens.kind == "prefix" and not stores:
            # Generation that stores nothing must not take the prefix for what it has read.
            setattr(output, cache_name, None)
        return output

    body.forward = forward
    try:
        yield
    finally:
        # The method of the class, which the attribute has hidden.
        del body.forward
        delattr(model, MODULE)


def body_of(model: Any) -> Any:
    """Return what of a causal model goes from tokens to hidden states: of some, a decoder within the body."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return model.base_model if decoder is None or decoder is model else decoder


def tree(values: Tensors, device: torch.device, *, trainable: bool) -> nn.Module:
    """Return a module whose parameters have the names and values of the tensors, without the name of the module."""
    root = nn.Module()
    for name, array in values.items():
        *path, leaf = name.removeprefix(f"{MODULE}.").split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, nn.Module())
            owner = getattr(owner, part)
        tensor = torch.tensor(np.asarray(array, np.float32), device=device)
        owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=trainable))
    return root


def call(plain: Callable[..., Any], cache_name: str, given: Mapping[str, Any], cache: Any) -> Any:
    """Call a body's forward method with a cache, by the name that its argument has there."""
    return plain(**given) if cache is None else plain(**given, **{cache_name: cache})


def read(plain: Callable[..., Any], given: dict[str, Any], cache: Any, model: Any, tokens: VirtualTokens) -> Any:
    """Return what a model's body gives for a text behind virtual tokens, for the text's places alone.

    Args:
        plain: the forward method of the body, called with its arguments by name and the cache.
        given: these arguments.
        cache: keys and values of what was read before; None for nothing.
        model: with the virtual tokens attached.
        tokens: their kind and number.
    """
    ids, embeds = given.get("input_ids"), given.get("inputs_embeds")
    rows = int(given["input_ids"].shape[0] if embeds is None else embeds.shape[0])
    # A text that goes on has in its cache what was put before it.
    begins = cache is None or cache.get_seq_length() == 0
    ahead = tokens.count if begins and tokens.kind != "prefix" else 0
    values = dict(getattr(model, MODULE).named_parameters())
    if begins and tokens.kind == "prefix":
        cache = fill_cache(model, values, rows, cache)
    elif begins:
        embeds = model.get_input_embeddings()(ids) if embeds is None else embeds
        prompt = embeddings(values).to(embeds.dtype)
        given["input_ids"], given["inputs_embeds"] = None, torch.cat([prompt.expand(rows, -1, -1), embeds], 1)
    if (mask := given.get("attention_mask")) is not None:
        given["attention_mask"] = torch.cat([mask.new_ones(rows, tokens.count), mask], 1)
    if (types := given.get("token_type_ids")) is not None:
        given["token_type_ids"] = torch.cat([types.new_zeros(rows, ahead), types], 1)
    if (places := given.get("position_ids")) is not None:
        first = torch.arange(ahead, device=places.device).expand(places.shape[0], -1)
        given["position_ids"] = torch.cat([first, places + tokens.count], 1)
    output = plain(given, cache)
    if ahead and isinstance(output, tuple):
        return (output[0][:, ahead:], *output[1:])
    if ahead:
        output.last_hidden_state = output.last_hidden_state[:, ahead:]
    return output


def embeddings(values: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a prompt's embeddings (n, width): as they are, or through P-tuning's encoder."""
    x = values["embedding"]
    for place in ENCODER_LAYERS if "encoder.0.weight" in values else ():
        x = linear(x, values[f"encoder.{place}.weight"], values[f"encoder.{place}.bias"])
        x = x if place == ENCODER_LAYERS[-1] else x.relu()
    return x


def fill_cache(model: Any, values: Mapping[str, torch.Tensor], rows: int, cache: Any) -> Any:
    """Return a cache that begins with a prefix, for so many rows; the one that generation gives is filled in place."""
    layers, *_ = cache_shape(model)
    cache = DynamicCache(config=model.config) if cache is None else cache
    for layer in range(layers):
        # (n, heads, width) -> (rows, heads, n, width)
        key, value = (
            values[f"layers.{layer}.{side}"].transpose(0, 1).expand(rows, -1, -1, -1).to(model.dtype) for side in SIDES
        )
        cache.update(key, value, layer)
    return cache


def check_room(settings: AdapterSettings, positions: int) -> None:
    """Refuse virtual tokens that leave no place for a text; before any is drawn, for they may be many."""
    if settings.tokens + LEAST_TEXT > positions:
        expected = f"at most {positions - LEAST_TEXT}, of the base's {positions} places all but {LEAST_TEXT}"
        raise ConfigError(Fault("adapter.tokens", expected, str(settings.tokens), "lower it: 20 are usual"))


def check_reads(settings: AdapterSettings, model: Any) -> None:
    """Refuse a base that does not read virtual tokens as it reads tokens: of such as say what a text does.

    Raises:
        ConfigError: naming the base and how it reads them.
    """
    if model.get_input_embeddings().weight.is_meta:  # without weights there is nothing to read with
        return
    hint = "choose another base, or set adapter.kind = 'lora'"
    expected = f"a base that reads virtual tokens of the kind {settings.kind!r} as it reads a text"
    try:
        moved, apart = misread(model, settings.kind)
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:120]}"
        got = f"a {model.config.model_type} with {reason}"
        raise ConfigError(Fault("adapter.kind", expected, got, hint)) from error
    if not moved <= (1e-3 if model.dtype == torch.float32 else 0.1) * apart:
        got = f"a {model.config.model_type}, whose outputs are {moved / apart:.0%} off"
        raise ConfigError(Fault("adapter.kind", expected, got, hint))


@torch.no_grad()
def misread(model: Any, kind: str) -> tuple[float, float]:
    """Return how far a base's outputs are off if the start of a text is given as virtual tokens, and if it is left out.

    Raises:
        ValueError: if it stores none, or keys and values of other shapes than its config says.
    """
    device, rows = model.get_input_embeddings().weight.device, model.get_input_embeddings().weight.shape[0]
    ids = ((rows // 2 + torch.arange(AHEAD + BEHIND, device=device)) % rows)[None]
    first, rest = ids[:, :AHEAD], ids[:, AHEAD:]
    whole = model(input_ids=ids, use_cache=False).logits[:, AHEAD:].float()
    alone = model(input_ids=rest, use_cache=False).logits.float()
    cache = store(model, first)
    if kind == "prefix":
        (layers, heads, width), own = cache_shape(model), dict[str, Array]()
        for layer in range(layers):
            for side, states in zip(SIDES, (cache.layers[layer].keys, cache.layers[layer].values), strict=True):
                if tuple(states.shape) != (1, heads, AHEAD, width):
                    expected = (1, heads, AHEAD, width)
                    raise ValueError(f"{side}s of {tuple(states.shape)} in layer {layer}, by its config {expected}")
                own[f"layers.{layer}.{side}"] = states[0].transpose(0, 1).float().cpu().numpy()
    else:
        own = {"embedding": embed(model, first[0].tolist())}
    values = full_names(own)
    with with_virtual_tokens(model, VirtualTokens(kind, AHEAD, values), values, trainable=False):
        read = model(input_ids=rest, attention_mask=torch.ones_like(rest), use_cache=False).logits.float()
    return float((read - whole).abs().max()), float((alone - whole).abs().max())


def store(model: Any, ids: torch.Tensor) -> Any:
    """Return a cache with the keys and values of some tokens.

    Raises:
        ValueError: if the model remembers texts in another way.
    """
    body, cache = body_of(model), DynamicCache(config=model.config)
    name = next((name for name in CACHE_NAMES if name in inspect.signature(body.forward).parameters), None)
    if name is not None:
        body(input_ids=ids, **{name: cache}, use_cache=True)
    if name is None or cache.get_seq_length() != ids.shape[1]:
        raise ValueError("no keys and values of what it has read")
    return cache
