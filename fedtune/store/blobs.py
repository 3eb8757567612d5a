"""States and updates of a run, each in a file named by the SHA-256 of its bytes."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.methods.serialization import digest
from fedtune.store import files


class Blobs:
    """The folder of a run's blobs: `<first two hex digits>/<digest>`. Only one process may write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lasting = set[Path]()
        """Folders whose own names are known to be on the disk."""

    def path(self, name: str) -> Path:
        """Return where a blob lies."""
        return self.folder / name[:2] / name

    def put(self, parts: Sequence[bytes | memoryview]) -> str:
        """Write the parts one behind the other, sync them, and return the blob's name.

        What lies there under the name is replaced. Others than the owner cannot read it: it may be a client's update.

        Raises:
            StoreError: if it cannot be written.
        """
        # Hashing and writing leave the interpreter to others, so that the one costs no time beside the other.
        with files.store_errors(self.folder), ThreadPoolExecutor(1) as hashing:
            hashed = hashing.submit(digest, parts)
            self._keep(self.folder)
            descriptor, temporary = files.create_beside(self.folder / "blob")
            try:
                try:
                    for part in parts:
                        files.write(descriptor, part)
                    files.sync(descriptor)
                finally:
                    os.close(descriptor)
                target = self.path(hashed.result())
                self._keep(target.parent)
                files.rename(temporary, target)
            except BaseException:
                files.remove(temporary)
                raise
            files.sync_folder(target.parent)
        return target.name

    def get(self, name: str, what: str) -> bytes:
        """Return the bytes of a blob; `what` says what it is, should it not be there.

        Raises:
            StoreError: if it is missing or damaged.
        """
        path = self.path(name)
        try:
            with files.store_errors(path):
                data = path.read_bytes()
        except StoreError as error:
            if not path.exists():
                raise StoreError(f"{path}: expected {what}; it is missing; {REMEDY}") from error
            raise
        found = digest([data])
        if found != name:
            raise StoreError(f"{path}: expected {what}, of digest {name[:12]}; got {found[:12]}; {REMEDY}")
        return data

    def present(self) -> Iterator[str]:
        """Yield the names of all blobs, in order."""
        with files.store_errors(self.folder):
            for path in sorted(self.folder.glob("??/*")):
                if re.fullmatch("[0-9a-f]{64}", path.name) and path.name.startswith(path.parent.name):
                    yield path.name

    def release(self, names: Collection[str]) -> None:
        """Remove blobs that nothing needs any more; should a crash bring one back, `sweep` removes it."""
        with files.store_errors(self.folder):
            for name in sorted(names):
                files.remove(self.path(name))

    def sweep(self, keep: Collection[str]) -> None:
        """Remove all blobs but these, and what a killed process was writing."""
        files.sweep(self.folder)
        self.release(set(self.present()) - set(keep))

    def _keep(self, folder: Path) -> None:
        """Make a folder whose name lasts; one that a killed process made may not, so that is seen to once."""
        if folder not in self._lasting:
            files.make_folder(folder)
            files.sync_folder(folder.parent)
            self._lasting.add(folder)


REMEDY = "put back a copy of the run directory, or start the run again with --fresh"
