"""A run's global model on disk: an adapter or seeds, depending on the method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.lora.adapter import Adapter, pack
from fedtune.methods.method import GlobalModel
from fedtune.store import manifest, peft, seeds
from fedtune.tensors import digest as tensors_digest

ADAPTER, SEEDS = "adapter", "seeds"
"""Names of the two folders; a run has one of them."""


def folder(run: Path) -> Path:
    """Return the folder of a run's result, whether or not it exists yet."""
    return run / SEEDS if (run / SEEDS).exists() else run / ADAPTER


def write(run: Path, tuned: GlobalModel, target: peft.Target, provenance: Mapping[str, Any]) -> Path:
    """Write a global model with its provenance, in one step, and return the folder."""
    if tuned.seeds is not None:
        return seeds.write(run / SEEDS, tuned.seeds, provenance)
    return peft.write(run / ADAPTER, tuned.adapter, tuned.saved, target, provenance)


def read(run: Path) -> tuple[GlobalModel, Mapping[str, Any]]:
    """Return (global model, provenance) of a run directory.

    Raises:
        StoreError: if there is none, or a file is torn or changed since it was written.
    """
    if (run / SEEDS).exists():
        model, provenance = seeds.read(run / SEEDS)
        return GlobalModel(seeds=model), provenance
    adapter, saved, provenance = peft.read(run / ADAPTER)
    return GlobalModel(adapter, saved), provenance


def remark(run: Path) -> str:
    """Return why the files of a run's result are not checked; empty if they are.

    Raises:
        StoreError: if there is none, or its manifest is damaged.
    """
    return manifest.open_folder(folder(run)).remark


def digest(tuned: GlobalModel) -> str:
    """Return the SHA-256 (hex) of a global model: of the ledger, or of what its adapter changes."""
    if tuned.seeds is not None:
        return tuned.seeds.ledger.digest.hex()
    return tensors_digest({**pack(nonzero(tuned.adapter)), **tuned.saved})


def same(ours: GlobalModel, theirs: GlobalModel) -> bool:
    """Return whether two global models are equal: the same numbers, moving the same tensors."""
    moved = [None if tuned.seeds is None else list(tuned.seeds.trainable) for tuned in (ours, theirs)]
    # The ledger's digest covers the head too, by that of the manifest.
    return digest(ours) == digest(theirs) and moved[0] == moved[1]


def nonzero(adapter: Adapter) -> Adapter:
    """Return the modules that change something: PEFT has no rank 0."""
    return {name: factors for name, factors in adapter.items() if factors.b.any()}
