"""A run's result as seeds: the ledger of K integers, the manifest of their base, and where they came from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedtune.directions import ledger, manifest
from fedtune.errors import StoreError, WireError
from fedtune.methods.method import Seeds
from fedtune.store.files import fill, guarded, new_folder

LEDGER, MANIFEST, ORIGIN = "ledger.ftks", "manifest.ftkm", "fedtune.json"


def write(path: Path, seeds: Seeds, provenance: Mapping[str, Any]) -> Path:
    """Write ledger, manifest and provenance in one step, and return the folder."""
    with new_folder(path) as folder:
        put(folder, seeds, provenance)
    return path


def put(folder: Path, seeds: Seeds, provenance: Mapping[str, Any]) -> None:
    """Write the three files into a folder that `new_folder` gives."""
    names = [seeds.manifest.entries[ordinal].name for ordinal in seeds.trainable]
    fill(folder / LEDGER, seeds.ledger.encode())
    fill(folder / MANIFEST, seeds.manifest.encode())
    fill(folder / ORIGIN, (json.dumps({**provenance, "trainable": names}, indent=1) + "\n").encode())


def read(path: Path) -> tuple[Seeds, Mapping[str, Any]]:
    """Return (seeds, provenance) of a folder that `write` made.

    Raises:
        StoreError: if a file is missing, torn, or they do not belong together.
    """
    with guarded(path):
        if not (path / LEDGER).is_file():
            raise StoreError(f"{path}: expected a seed ledger ({LEDGER}); run fedtune simulate first")
        parts = [(path / name).read_bytes() for name in (LEDGER, MANIFEST, ORIGIN)]
    try:
        found, listed, provenance = ledger.decode(parts[0]), manifest.decode(parts[1]), json.loads(parts[2])
        ordinals = tuple(listed.ordinals[name] for name in provenance["trainable"])
    except (WireError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: expected whole files of one run; {error}; put back a copy") from error
    if found.manifest != listed.digest:
        raise StoreError(f"{path}: expected the manifest that the ledger names; got another; put back a copy")
    return Seeds(found, listed, ordinals), provenance
