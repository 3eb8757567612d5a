"""The global model that a device has last received, as seeds, in one file of its state: it survives a power cut."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedtune.directions.seed_ledger import SeedLedger, decode_ledger
from fedtune.errors import StoreError, WireError
from fedtune.store.files import store_errors, write_bytes

NAME = "model.ftks"
"""Within the state folder."""
MAGIC = b"FTCM1\n"
DIGEST = 32
"""Bytes of the SHA-256 behind the magic, of all that follows it."""


@dataclass(frozen=True)
class CurrentModel:
    """A global model as changes of the base that the device holds."""

    ledger: SeedLedger
    trainable: tuple[int, ...]
    """Ordinals of the matrices that are moved, rising."""


def store_model(state: Path, model: CurrentModel) -> None:
    """Replace the file in one step.

    Raises:
        StoreError: if it cannot be written; the model of before is still there.
    """
    places = np.asarray(model.trainable, "<u4").tobytes()
    body = len(model.trainable).to_bytes(4, "little") + places + model.ledger.encode()
    write_bytes(state / NAME, MAGIC + hashlib.sha256(body).digest() + body, mode=0o600)


def read_model(state: Path) -> CurrentModel | None:
    """Return the model that was stored last; None if none was.

    Raises:
        StoreError: if the file is another one than was written.
    """
    path = state / NAME
    with store_errors(path):
        if not path.exists():
            return None
        data = path.read_bytes()
    start = len(MAGIC) + DIGEST
    body = data[start:]
    if data[: len(MAGIC)] != MAGIC or data[len(MAGIC) : start] != hashlib.sha256(body).digest():
        raise StoreError(f"{path}: expected the model that was written there; got other bytes; delete the file")
    end = 4 + 4 * int.from_bytes(body[:4], "little")
    try:
        return CurrentModel(decode_ledger(body[end:]), tuple(np.frombuffer(body[4:end], "<u4").tolist()))
    except WireError as error:
        raise StoreError(f"{path}: {error}; delete the file") from error
