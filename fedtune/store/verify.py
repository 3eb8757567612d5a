"""The status of a run directory, and whether every record and blob in it is intact; safe beside a run in progress."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedtune.errors import StoreError
from fedtune.store.blobs import Blobs
from fedtune.store.history import History, replay_journal
from fedtune.store.journal import End
from fedtune.store.lock import holder
from fedtune.store.run_directory import check_run


@dataclass(frozen=True)
class Status:
    """How far a run is."""

    run: str
    """Identifier of the run, drawn at its start."""
    inputs: Mapping[str, Any]
    """What it was started with."""
    begun: bool
    """Whether its journal has a record; a run that was killed before that starts when it is resumed."""
    committed: int
    """Rounds committed."""
    state: str
    """Digest of the state after the last of them; empty before the first."""
    open: int | None
    """Number of the round that has begun and is not committed."""
    missing: Sequence[str]
    """Clients that it still waits for."""
    epochs: int
    """Processes that have run it: one more than the times it was resumed."""
    finished: bool
    holder: str | None
    """Number of the process that runs it now."""
    num_bytes: int
    """Of all files in the run directory."""


@dataclass(frozen=True)
class Verified:
    """How much was checked and is intact."""

    records: int
    epochs: int
    committed: int
    """Rounds committed."""
    blobs: int
    num_bytes: int
    """Of the blobs."""
    torn_bytes: int
    """Behind the journal's last record: a record that is being written, or a torn one that a resume will cut off."""
    folders: int = 0
    """With a manifest: the result, and the exports that lie within the run directory."""
    files: int = 0
    """Listed in these manifests."""
    entries: int = 0
    """Of the audit log of a served run."""
    remarks: tuple[str, ...] = ()
    """Why the files of a folder could not be checked."""


def status(run: Path) -> Status:
    """Return how far a run is.

    Raises:
        StoreError: if the folder is no run directory, or its journal is damaged.
    """
    if (run / "journal").exists():
        history, end = replay_journal(run)
    else:
        check_run(run)
        history, end = History(), End()
    return Status(
        run=history.run,
        inputs=history.inputs[0] if history.inputs else {},
        begun=bool(history.inputs),
        committed=history.committed,
        state=history.digests[-1] if history.digests else "",
        open=history.open.number if history.open else None,
        missing=history.missing,
        epochs=end.epoch,
        finished=history.finished,
        holder=holder(run),
        num_bytes=size(run),
    )


def verify(run: Path) -> Verified:
    """Check the whole chain of the journal, and every blob that is needed or present.

    Raises:
        StoreError: naming the first record or blob that is missing or damaged.
    """
    history, end = replay_journal(run)
    while True:
        try:
            return check_run_files(run, history, end)
        except StoreError:
            before = end
            history, end = replay_journal(run)
            if end == before:
                raise
            # The run went on meanwhile and may have removed a blob that it no longer needs: look again.


def check_run_files(run: Path, history: History, end: End) -> Verified:
    blobs, needed = Blobs(run / "blobs"), history.needed()
    present = set(blobs.present())
    num_bytes = 0
    for name in sorted(present | needed.keys()):
        try:
            num_bytes += len(blobs.get(name, needed.get(name, "a whole blob")))
        except StoreError as error:
            if end.torn_bytes and name not in present:
                # Damage to the last record looks like a torn one, and that record may be why the blob was removed.
                raise StoreError(
                    f"{run / 'journal'}, record {end.count} at byte {end.num_bytes}: expected a whole record, or none; "
                    f"got {end.torn_bytes} bytes, torn or damaged; then {error}"
                ) from error
            raise
    return Verified(end.count, end.epoch, history.committed, len(present | needed.keys()), num_bytes, end.torn_bytes)


def size(folder: Path) -> int:
    """Return the bytes of all files in a folder; a file that is removed meanwhile counts nothing."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                total += os.lstat(os.path.join(parent, name)).st_size
    return total
