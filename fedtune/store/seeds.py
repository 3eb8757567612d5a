"""A run's result as seeds: the ledger of K integers, the manifest of their base, and their provenance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from fedtune.directions import seed_ledger
from fedtune.directions.seed_ledger import decode_manifest, replace_tensors
from fedtune.directions.space import check_moved, stacked_factors
from fedtune.errors import ConfigError, StoreError, WireError
from fedtune.lora.adapter import Adapter, Factors
from fedtune.methods.method import SeedModel
from fedtune.store import manifest as manifests
from fedtune.store.files import fill, new_folder, store_errors

LEDGER, MANIFEST, HEAD = "ledger.ftks", "manifest.ftkm", "head.safetensors"
"""The last of them only where the run has made a classifier's head, from which the ledger's weights start."""


def write(path: Path, seeds: SeedModel, provenance: Mapping[str, Any]) -> Path:
    """Write ledger, manifest and provenance in one step, and return the folder."""
    with new_folder(path) as folder:
        put(folder, seeds, provenance)
    return path


def put(folder: Path, seeds: SeedModel, provenance: Mapping[str, Any]) -> None:
    """Write its files into a folder of `files.new_folder`, the manifest of all that is in it last."""
    names = [seeds.manifest.entries[ordinal].name for ordinal in seeds.trainable]
    fill(folder / LEDGER, seeds.ledger.encode())
    fill(folder / MANIFEST, seeds.manifest.encode())
    if seeds.head:
        fill(folder / HEAD, save({name: np.ascontiguousarray(array) for name, array in seeds.head.items()}))
    manifests.write(folder, {**provenance, "trainable": names})


def read(path: Path) -> tuple[SeedModel, Mapping[str, Any]]:
    """Return (seeds, provenance) of a folder that `write` made.

    Raises:
        StoreError: if a file is missing, torn, changed since it was written, or they do not belong together.
    """
    with store_errors(path):
        if not (path / LEDGER).is_file():
            raise StoreError(f"{path}: expected a seed ledger ({LEDGER}); run fedtune simulate first")
    opened = manifests.open_folder(path)
    provenance = opened.facts
    parts = [opened.read(name) for name in (LEDGER, MANIFEST)]
    try:
        ledger, manifest = seed_ledger.decode_ledger(parts[0]), decode_manifest(parts[1])
        ordinals = tuple(manifest.ordinals[name] for name in provenance["trainable"])
        check_moved(ledger.bank, ordinals)
    except (WireError, ConfigError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: expected whole files of one run; {error}; put back a copy") from error
    try:
        head = load(opened.read(HEAD)) if (path / HEAD).is_file() else {}
        if replace_tensors(manifest, head) != manifest:
            raise ValueError("the head is none of the manifest's")
    except (SafetensorError, ValueError, KeyError, StopIteration) as error:
        raise StoreError(f"{path}: expected whole files of one run; {HEAD}: {error}; put back a copy") from error
    if ledger.manifest != manifest.digest:
        raise StoreError(f"{path}: expected the manifest that the ledger names; got another; put back a copy")
    return SeedModel(ledger, manifest, ordinals, head), provenance


def kron_adapter(change: SeedModel, *, transposed: bool) -> Adapter:
    """Return the change of every matrix that banks of kron move, as factors of scale 1 and of rank p for each bank.

    Args:
        change: of a run with the bank `kron` that moves matrices of linear layers alone.
        transposed: whether the layers hold their weights as (in, out).
    """
    ledger, adapter = change.ledger, {}
    for ordinal in change.trainable:
        entry = change.manifest.entries[ordinal]
        a, b = stacked_factors(
            ledger.bank,
            ledger.accumulators,
            ordinal=ordinal,
            shape=entry.shape,
            exponent=ledger.exponent,
            transposed=transposed,
        )
        adapter[entry.name.removesuffix(".weight")] = Factors(a=a, b=b)
    return adapter
