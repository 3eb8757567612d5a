"""What a Flower client of FedEx, or of FLoRA with down = "whole", adds: the frozen change beside its own adapter.

This is the one piece of the strategies that runs at a client. It names no torch: it calls what Flower and the client's
own model bring.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from flwr.app import ArrayRecord, RecordDict

from fedtune.errors import ClientError

FROZEN = "frozen"
"""Name of its ArrayRecord in a message."""
DIGEST = "frozen-digest"
"""Metric by which a client says which frozen change it has added."""
ADDED = "fedtune_frozen_change"
"""Attribute of a layer that a change was added to: the handle that takes it away."""


def digest(record: ArrayRecord) -> int:
    """Return the first 48 bits of the SHA-256 of a record's names and bytes: a whole number that any float can hold."""
    sha = hashlib.sha256()
    for key in sorted(record):
        sha.update(key.encode() + b"\0" + record[key].data)
    return int.from_bytes(sha.digest()[:6], "big")


def add_frozen(model: Any, content: RecordDict) -> dict[str, int]:
    """Add a message's frozen change to a PEFT model, and return what the reply's metrics must say of it.

    The output of each adapted layer becomes base(x) + b (a x) + what the adapter adds. The base itself is not touched,
    so it may be quantised; the change is computed in the format of the layer's input. Call it before training or
    evaluation; a model that lives on takes the change of each message in place of the one before.

    Args:
        model: of `get_peft_model`.
        content: of the message.

    Raises:
        ClientError: if a layer of the change is not in the model.
    """
    record = content.array_records.get(FROZEN)
    layers = dict(model.named_modules()) if hasattr(model, "named_modules") else {}
    # Two changes would add up, and the digest would not show it.
    for layer in layers.values():
        if handle := layer.__dict__.pop(ADDED, None):
            handle.remove()
    if not record:
        return {}
    for name, factors in by_layer(record.to_torch_state_dict()).items():
        base = getattr(layers.get(name), "base_layer", None)
        if base is None:
            raise ClientError(f"expected an adapted layer {name!r}, which a frozen change came for; the model has none")
        base.__dict__[ADDED] = base.register_forward_hook(adding(factors))
    return {DIGEST: digest(record)}


def by_layer(arrays: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return (a, b), or one dense matrix, by layer."""
    layers = dict[str, dict[str, Any]]()
    for key, array in arrays.items():
        name, _, part = key.rpartition(".")
        layers.setdefault(name, {})[part] = array
    return {name: (parts["a"], parts["b"]) if "a" in parts else (parts["w"],) for name, parts in layers.items()}


def adding(factors: tuple[Any, ...]) -> Callable[[Any, tuple[Any, ...], Any], Any]:
    """Return a hook of a layer that adds x times each factor, in turn, to its output."""
    cast = dict[tuple[Any, Any], tuple[Any, ...]]()

    def hook(layer: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        x = inputs[0]
        # In the input's own format and on its device, once for each: a layer may be moved after the hook is set.
        if (x.dtype, x.device) not in cast:
            cast[x.dtype, x.device] = tuple(one.to(dtype=x.dtype, device=x.device) for one in factors)
        for factor in cast[x.dtype, x.device]:
            x = x @ factor.T
        return output + x.to(output.dtype)

    return hook
