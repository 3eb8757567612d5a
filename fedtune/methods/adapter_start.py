"""Starts from an adapter that is there: its factors in the places that a method trains, or why they have none."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedtune.errors import ConfigError, Fault
from fedtune.lora.adapter import Adapter, unpack
from fedtune.lora.lowrank import LowRank, compress
from fedtune.methods.flora import warm_start
from fedtune.tensors import Array, Tensors

KEY = "adapter.start"
OUTSIDE = 1e-5
"""Largest share of a change that may lie outside the rows of a frozen A: what rounding leaves of a change within."""


def fill(tensors: Tensors, adapter: Adapter, *, method: str) -> Tensors:
    """Return flat factors whose product is an adapter's: its own first, then the rows of A that it leaves, b zero.

    Modules that the adapter lacks stay as they are.

    Raises:
        ConfigError: if a module's rank is larger than that of the flat factors.
    """
    filled = dict(tensors)
    for name, factors in adapter.items():
        a, b, rank = tensors[f"{name}.a"], tensors[f"{name}.b"], factors.rank
        check_rank(rank, len(a), name, method)
        # Rows of zero in both factors would never get a gradient: the rest of A is drawn, as at any other start.
        filled[f"{name}.a"] = np.concatenate([factors.a, a[rank:]])
        filled[f"{name}.b"] = np.concatenate([factors.b, np.zeros_like(b[:, rank:])], axis=1)
    return filled


def fill_leading(tensors: Tensors, adapter: Adapter, *, method: str) -> Tensors:
    """Return as `fill` does, the largest components first: a client of smaller rank gets the first places alone."""
    components = leading_components(adapter, rank_of(tensors), method=method)
    return fill(tensors, unpack(warm_start(components, rank_of(tensors), "fp32")), method=method)


def leading_components(adapter: Adapter, max_rank: int, *, method: str) -> Mapping[str, LowRank]:
    """Return an adapter's change by module, exact to float32.

    Raises:
        ConfigError: if one has more components than a client can hold.
    """
    changes = compress(adapter)
    for name, low in changes.items():
        check_rank(low.rank, max_rank, name, method)
    return changes


def rank_of(tensors: Tensors) -> int:
    """Return the rank of flat factors, which is that of each module."""
    return max((len(array) for name, array in tensors.items() if name.endswith(".a")), default=0)


def check_rank(rank: int, most: int, name: str, method: str) -> None:
    """Raise ConfigError where a module of an adapter has a larger rank than a method's factors."""
    if rank > most:
        hint = f"set adapter.rank = {rank}, or use method = 'flora', which takes any"
        expected = f"at most rank {most} in every module, as the recipe's method {method!r} trains"
        raise ConfigError(Fault(KEY, expected, f"{rank} in {name}", hint))


def project(adapter: Adapter, drawn: Mapping[str, Array]) -> Tensors:
    """Return b' of every module of an adapter, so that b' times the frozen A is its change.

    Raises:
        ConfigError: if a change has rows outside the span of A's.
    """
    projected = {}
    for name, factors in adapter.items():
        a = drawn[name].astype(np.float64)  # (rank, in)
        within = np.linalg.lstsq(a.T, factors.a.astype(np.float64).T, rcond=None)[0].T  # (r, rank)
        b = factors.b.astype(np.float64)
        outside, size = np.linalg.norm(b @ (factors.a - within @ a)), np.linalg.norm(b @ factors.a)
        if outside > OUTSIDE * size:
            expected = "an adapter over the A that the recipe's seed draws, as of a run of 'ffa' with the same seed"
            hint = "use method = 'flora', which takes any"
            raise ConfigError(Fault(KEY, expected, f"{outside / size:.0%} of {name} outside its rows", hint))
        projected[f"{name}.b"] = (b @ within).astype(np.float32)
    return projected
