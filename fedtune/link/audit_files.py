"""Files of an audit log: the newest, which grows, and the full ones before it, all in one chain of hashes.

A full file is renamed to `NAME.000001` and so on, and never touched again; the first record of the next one names the
digest of its last. Both steps of that leave whole records under known names, so a crash between them loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.store import files, journal
from fedtune.store.journal import End, Journal, Record

FULL_BYTES = 64 * 2**20
"""From which on a file is full."""
TRIES = 5
"""Of a reader beside a process that writes: each may meet a file that has just become full."""


def full_file(path: Path, number: int) -> Path:
    """Return the name of the full file of a number, from 1."""
    return path.with_name(f"{path.name}.{number:06d}")


def full_files(path: Path) -> Sequence[Path]:
    """Return the full files of a log, in order.

    Raises:
        StoreError: if one is missing: its records were removed, and no later one can be trusted to follow them.
    """
    present = sorted(path.parent.glob(f"{path.name}.[0-9][0-9][0-9][0-9][0-9][0-9]"))
    for number, file in enumerate(present, 1):
        if file != full_file(path, number):
            wanted = full_file(path, number)
            raise StoreError(f"{wanted}: expected this part of the audit log before {file.name}; got none; put it back")
    return present


def exists(path: Path) -> bool:
    """Return whether there is a log, also where a crash left it with full files alone."""
    return path.is_file() or full_file(path, 1).is_file()


def read(path: Path, apply: Callable[[Record], None]) -> End:
    """Call `apply` with every record of all files, in order, and return where the newest file ends.

    Safe beside a process that writes.

    Raises:
        StoreError: naming the first file and record that is missing, damaged or breaks the chain.
    """
    for _ in range(TRIES):
        before, records = full_files(path), list[Record]()
        try:
            end = read_files(path, before, records.append)
        except StoreError:
            # What was the newest file may have become full meanwhile: then the chain goes on elsewhere.
            if full_files(path) == before:
                raise
            continue
        if full_files(path) == before:
            for record in records:
                apply(record)
            return end
    raise StoreError(f"{path}: expected an audit log; got one that is renamed all the time; try again")


def read_files(path: Path, full: Sequence[Path], apply: Callable[[Record], None]) -> End:
    """Read full files and the newest one, which a crash may have left unmade, as `read` does."""
    end = End()
    for file in full:
        end = journal.read(file, apply, after=end)
        if end.torn_bytes:
            raise StoreError(f"{file}: expected whole records; got {end.torn_bytes} bytes more; put back a copy")
        end = replace(end, num_bytes=0)
    return journal.read(path, apply, after=end) if path.exists() else end


def begin_next(path: Path, current: Journal) -> Journal:
    """Put a full file away, and return the next one, still empty; the current one is closed.

    Raises:
        StoreError: if that failed; nothing more can be appended then.
    """
    end = current.end
    try:
        with files.store_errors(path):
            files.rename(path, full_file(path, len(full_files(path)) + 1))
            # Else a power cut could bring the old name back, and the next file's records would be in its place.
            files.sync_folder(path.parent)
        # One process writes both: its epoch stays.
        return Journal(path, replace(end, epoch=end.epoch - 1, num_bytes=0))
    finally:
        current.close()
