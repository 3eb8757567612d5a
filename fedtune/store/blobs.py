"""States and updates of a run, each in a file that is named by the SHA-256 of its content."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.methods.serialization import digest
from fedtune.store import files
from fedtune.store.run_directory import REMEDY


class Blobs:
    """The folder of a run's blobs: `<first two hex digits>/<digest>`. Only one process may write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._durable_folders = set[Path]()
        """Folders whose own names are known to be on the disk."""

    def path(self, name: str) -> Path:
        """Return where a blob lies."""
        return self.folder / name[:2] / name

    def put(self, parts: Sequence[bytes | memoryview]) -> str:
        """Write the parts one after the other, sync them, and return the blob's name.

        A file that has the name already is replaced. Only the owner can read a blob: it may be a client's update.

        Raises:
            StoreError: if it cannot be written.
        """
        # Hashing and writing both release the interpreter lock, so a second thread hides the time of hashing.
        with files.store_errors(self.folder), ThreadPoolExecutor(1) as hashing:
            hashed = hashing.submit(digest, parts)
            self._make_durable(self.folder)
            descriptor, temporary = files.create_beside(self.folder / "blob")
            try:
                try:
                    for part in parts:
                        files.write(descriptor, part)
                    # Before the rename: after a power cut a name must never lead to bytes that are not on the disk.
                    files.sync(descriptor)
                finally:
                    os.close(descriptor)
                target = self.path(hashed.result())
                self._make_durable(target.parent)
                files.rename(temporary, target)
            except BaseException:
                files.remove(temporary)
                raise
            files.sync_folder(target.parent)  # the name itself; the journal's next record relies on it
        return target.name

    def get(self, name: str, what: str) -> bytes:
        """Return the bytes of a blob; `what` describes it in the error.

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
        actual = digest([data])
        if actual != name:
            raise StoreError(f"{path}: expected {what}, of digest {name[:12]}; got {actual[:12]}; {REMEDY}")
        return data

    def present(self) -> Iterator[str]:
        """Yield the names of all blobs, in order."""
        with files.store_errors(self.folder):
            for path in sorted(self.folder.glob("??/*")):
                if re.fullmatch("[0-9a-f]{64}", path.name) and path.name.startswith(path.parent.name):
                    yield path.name

    def release(self, names: Collection[str]) -> None:
        """Remove blobs that are no longer needed. Not synced: if a crash brings one back, `sweep` removes it."""
        with files.store_errors(self.folder):
            for name in sorted(names):
                files.remove(self.path(name))

    def sweep(self, keep: Collection[str]) -> None:
        """Remove all blobs but these, and the unfinished files of a killed process."""
        files.sweep(self.folder)
        self.release(set(self.present()) - set(keep))

    def _make_durable(self, folder: Path) -> None:
        """Make a folder and sync its name, once per process: a killed process may have made it without the sync."""
        if folder not in self._durable_folders:
            files.make_folder(folder)
            files.sync_folder(folder.parent)
            self._durable_folders.add(folder)
