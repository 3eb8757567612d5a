"""Adapters of several trainings as one: their weighted sum, exact or cut to a rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from fedtune.errors import ConfigError, Fault, StoreError
from fedtune.lora.adapter import Adapter, stack
from fedtune.lora.lowrank import LowRank, compress, truncate
from fedtune.lora.virtual_tokens import are_virtual
from fedtune.store import peft
from fedtune.store.peft_import import ForeignAdapter, read_adapter, same_base
from fedtune.tensors import Tensors


@dataclass(frozen=True)
class MergedAdapter:
    """An adapter that is the weighted sum of others."""

    path: Path
    rank: int
    """Of the module with the largest."""
    energy_kept: float
    """Share of the squared singular values that is left: 1 for an exact sum."""
    weights: Sequence[float]
    remarks: Sequence[str] = ()
    """Why the files of an adapter were not checked, of each that fedtune wrote before it listed digests."""


def merge(
    adapters: Sequence[str | Path],
    *,
    out: str | Path,
    weights: Sequence[float] | None = None,
    max_rank: int | None = None,
    base: str | None = None,
) -> MergedAdapter:
    """Write the weighted sum of PEFT adapters as one PEFT adapter.

    Ranks, alphas, rsLoRA, patterns and targets may differ. The sum is exact: factors are concatenated, so its rank is
    the sum of theirs, at most that of the layer.

    Args:
        adapters: folders in PEFT's format, or run directories.
        out: folder to write.
        weights: factor on each; the mean, 1 / n of each, without it.
        max_rank: cut every module to its best approximation of this rank.
        base: name of the base to write, for adapters that name one base differently; their names are not compared.

    Raises:
        ConfigError: if an adapter is of another base or more than factors, or the weights do not fit.
        StoreError: if a folder cannot be read, or `out` holds files already.
    """
    target = Path(out)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StoreError(f"{target}: expected a new or an empty folder; it holds files; choose another with --out")
    shares = checked_weights(adapters, weights)
    if max_rank is not None and max_rank < 1:
        raise ConfigError(Fault("max_rank", "at least 1", str(max_rank)))
    read = [read_adapter(Path(path)) for path in adapters]
    if base is not None:
        read = [
            replace(source, target=replace(source.target, base=base, revision=None), base_digest="") for source in read
        ]
    if virtual := next((source for source in read if are_virtual(source.saved)), None):
        expected = "adapters of factors: the sum of virtual tokens is not read as both of them would be"
        got = f"{virtual.path}, of virtual tokens"
        raise ConfigError(Fault("adapters", expected, got, "leave it out, or train on with adapter.start"))
    if faults := [*same_base(read), *shape_faults(read)]:
        raise ConfigError(faults)
    saved = common_saved(read)
    whole = stack([(source.adapter, share) for source, share in zip(read, shares, strict=True)])
    merged, energy_kept = cut_ranks(whole, max_rank)
    saved_modules = sorted({name for source in read for name in source.target.saved_modules})
    written = peft.write(
        target, merged, saved, replace(read[0].target, saved_modules=saved_modules), provenance(read, shares, merged)
    )
    rank, remarks = max(factors.rank for factors in merged.values()), [source.remark for source in read]
    return MergedAdapter(written, rank, energy_kept, shares, [remark for remark in remarks if remark])


def checked_weights(adapters: Sequence[str | Path], weights: Sequence[float] | None) -> Sequence[float]:
    """Return one factor per adapter.

    Raises:
        ConfigError: if their number differs, one is not finite, or there is no adapter.
    """
    if not adapters:
        raise ConfigError(Fault("adapters", "at least one folder", "none"))
    shares = [1 / len(adapters)] * len(adapters) if weights is None else [float(weight) for weight in weights]
    if len(shares) != len(adapters):
        raise ConfigError(Fault("weights", f"{len(adapters)} numbers, one per adapter", f"{len(shares)}"))
    if not all(map(math.isfinite, shares)) or not any(shares):
        raise ConfigError(Fault("weights", "finite numbers, not all of them 0", ", ".join(map(str, shares))))
    return shares


def with_base(source: ForeignAdapter, base: str) -> ForeignAdapter:
    """Return the adapter under another name of its base, which the caller answers for."""
    return replace(source, target=replace(source.target, base=base, revision=None), base_digest="")


def shape_faults(read: Sequence[ForeignAdapter]) -> Iterator[Fault]:
    """Yield the modules that have other sizes in another adapter: their bases cannot be the same."""
    shapes: dict[str, tuple[int, int]] = {}
    for source in read:
        for name, factors in source.adapter.items():
            if (shape := shapes.setdefault(name, factors.shape)) != factors.shape:
                yield Fault(str(source.path), f"{name} of (out, in) {shape}, as in the first", str(factors.shape))


def common_saved(read: Sequence[ForeignAdapter]) -> Tensors:
    """Return the modules that were trained whole.

    Raises:
        ConfigError: if two adapters hold other values of one: a sum of changes needs the base's values, which no
            adapter holds.
    """
    saved: dict[str, np.ndarray] = {}
    for source in read:
        for name, array in source.saved.items():
            if name in saved and not np.array_equal(saved[name], array):
                expected = f"the values of {name} that the others have: modules_to_save are whole weights, not changes"
                raise ConfigError(Fault(str(source.path), expected, "other values", "merge the adapters without them"))
            saved[name] = array
    return saved


def cut_ranks(whole: Adapter, max_rank: int | None) -> tuple[Adapter, float]:
    """Return the sum with no rank above its layer's or `max_rank`, and the share of squared singular values kept."""
    if max_rank is None:
        long = {name: factors for name, factors in whole.items() if factors.rank > min(factors.shape)}
        return {**whole, **{name: low.factors for name, low in compress(long).items()}}, 1.0
    exact = compress(whole)
    short = {name: truncate(low, tau=1.0, max_rank=max_rank) for name, low in exact.items()}
    return {name: low.factors for name, low in short.items()}, share_kept(exact, short)


def share_kept(exact: Mapping[str, LowRank], short: Mapping[str, LowRank]) -> float:
    """Return the share of all squared singular values that is left."""
    before, after = (sum(float(np.square(low.s).sum()) for low in part.values()) for part in (exact, short))
    return after / before if before else 1.0


def provenance(read: Sequence[ForeignAdapter], shares: Sequence[float], merged: Adapter) -> Mapping[str, object]:
    """Return what travels inside the folder: which adapters it is the sum of."""
    digests = {source.base_digest for source in read if source.base_digest}
    return {
        "fedtune": version("fedtune"),
        "method": "merge",
        "base": {"name": read[0].target.base, "digest": digests.pop() if len(digests) == 1 else ""},
        "merged": [
            {"path": source.path.name, "digest": source.digest, "weight": share}
            # A chain back to what fedtune wrote; adapters of others have no manifest.
            | ({"manifest": source.manifest} if source.manifest else {})
            for source, share in zip(read, shares, strict=True)
        ],
        "modules": {name: factors.rank for name, factors in sorted(merged.items())},
    }
