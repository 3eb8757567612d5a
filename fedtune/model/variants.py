"""The same base in another number format beside it, for clients whose plan says so: only the codes take memory."""

from __future__ import annotations

from dataclasses import replace

from fedtune.errors import ClientError
from fedtune.messages import BaseDtype
from fedtune.model.base import Base
from fedtune.model.quantised_layers import quantisable, quantise_layers, shared_copy
from fedtune.model.quantised_linear import choose_kernels
from fedtune.model.settings import quantised_format


def variant(base: Base, dtype: BaseDtype) -> Base:
    """Return a base in a number format: itself, or one whose quantised layers stand beside the base's own weights.

    Each variant is made once and stays with the base. What is not quantised is shared: the same tensors, which a block
    that exchanges them gives back before another client begins.

    Raises:
        ClientError: if the base itself is there as codes of another format alone.
    """
    kind = quantised_format(dtype)
    if kind is None or kind == base.dtype:
        return base
    if base.quantised is not None:
        raise ClientError(
            f"{base.name}: expected a plan over {base.dtype}, of which alone this client holds codes; got {dtype}; "
            'set the planner\'s formats to it, or model.dtype = "float32" at this client'
        )
    if dtype not in base.variants:
        model = shared_copy(base.model)
        names = quantisable(model, base.saved_modules)
        quantise_layers(model, names, kind, kernels=choose_kernels(base.kernels, kind, base.device))
        listed = {f"{name}.weight" for name in names}
        base.variants[dtype] = replace(
            base,
            model=model,
            dtype=kind,
            quantised=lambda: {entry.name: entry for entry in base.manifest.entries if entry.name in listed},
        )
    other: Base = base.variants[dtype]
    return other
