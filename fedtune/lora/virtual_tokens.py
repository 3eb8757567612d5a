"""Virtual tokens as flat tensors: their names, what they hold, and their layout in PEFT's files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from fedtune.errors import ShapeError
from fedtune.tensors import Array, Tensors

MODULE = "virtual_tokens"
"""Name of the part of a model that its virtual tokens are, while they are attached."""
ENCODER_LAYERS = (0, 2, 4)
"""Places of the linear layers in P-tuning's encoder, as PEFT numbers them; between them are ReLUs."""
SIDES = ("key", "value")

# n: virtual tokens, d: width of embeddings, L: layers, h: heads of keys and values, w: width of a head
# prompt:   virtual_tokens.embedding (n, d)
# p-tuning: the same, or what its encoder reads, with virtual_tokens.encoder.{0,2,4}.{weight,bias}
# prefix:   virtual_tokens.layers.<layer>.{key,value} (n, h, w)


def are_virtual(names: Iterable[str]) -> bool:
    """Return whether tensors of these names are virtual tokens, which belong to no layer of the base."""
    return any(name.startswith(f"{MODULE}.") for name in names)


def own_names(tensors: Tensors) -> Mapping[str, Array]:
    """Return virtual tokens by their names within the part."""
    return {name.removeprefix(f"{MODULE}."): array for name, array in tensors.items()}


def full_names(tensors: Tensors) -> Tensors:
    """Return virtual tokens by parameter name, sorted."""
    return {f"{MODULE}.{name}": array for name, array in sorted(tensors.items())}


def has_encoder(own: Tensors) -> bool:
    return "encoder.0.weight" in own


def encode(own: Tensors, rounded: Callable[[Array], Array] = lambda x: x) -> Array:
    """Return the embeddings (n, d) that P-tuning's encoder gives, `rounded` after each layer; float32."""
    x: Array = own["embedding"].astype(np.float64)
    for place in ENCODER_LAYERS if has_encoder(own) else ():
        weight, bias = (own[f"encoder.{place}.{name}"].astype(np.float64) for name in ("weight", "bias"))
        x = rounded(x @ weight.T + bias)
        x = x if place == ENCODER_LAYERS[-1] else np.maximum(x, 0)
    return x.astype(np.float32)


def num_layers(own: Tensors) -> int:
    """Return the layers of a prefix; 0 of other virtual tokens."""
    return sum(name.startswith("layers.") for name in own) // len(SIDES)


def flatten_prefix(own: Tensors) -> Array:
    """Return a prefix as PEFT stores it: (n, L * 2 * h * w), of each layer the keys and then the values."""
    sides = [own[f"layers.{layer}.{side}"] for layer in range(num_layers(own)) for side in SIDES]
    return np.concatenate([side.reshape(len(side), -1) for side in sides], axis=1)


def unflatten_prefix(flat: Array, layers: int, heads: int) -> Tensors:
    """Return the keys and values of a prefix that PEFT stored.

    Raises:
        ShapeError: if its width is none of so many layers and heads.
    """
    count, width = flat.shape
    if min(count, layers, heads) < 1 or width % (layers * len(SIDES) * heads):
        raise ShapeError(f"prefix: expected the keys and values of {layers} layers and {heads} heads; got {flat.shape}")
    parts = flat.reshape(count, layers, len(SIDES), heads, -1)
    return {
        f"layers.{layer}.{side}": np.ascontiguousarray(parts[:, layer, place])
        for layer in range(layers)
        for place, side in enumerate(SIDES)
    }
