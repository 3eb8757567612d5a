"""Parts of answers on the server's disk while they arrive: found again after a cut, and hashed before they are used."""

from __future__ import annotations

import mmap
import os
import shutil
import time
from hashlib import sha256
from pathlib import Path

from fedtune.link.rejections import rejection
from fedtune.store.files import store_errors
from fedtune.wire.v1 import link_pb2 as pb

BLOCK = 2**20


def place(folder: Path, client: str, digest: bytes) -> Path:
    """Return where a part of a client's answer lies; a name of the roster is a name of a file."""
    return folder / f"{client}-{digest.hex()}"


def stored_bytes(path: Path) -> int:
    """Return how many bytes of a part are there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class IncomingUpload:
    """A part while it arrives: appended to its file, and hashed as it comes."""

    def __init__(self, path: Path, part: pb.Part, offset: int) -> None:
        """Open the file behind what it holds, which is hashed again.

        Nothing is synced: a receipt is given for what the journal has, and what a crash spoils here is sent again.

        Raises:
            RefusalError: if the sender does not start where the file ends.
            StoreError: if the file cannot be opened.
        """
        found = stored_bytes(path)
        if offset != found:
            raise rejection(pb.OFFSET, "offset", found, offset)
        self.path, self.taken, self._num_bytes, self._digest = path, found, part.num_bytes, part.digest
        self._hash = sha256()
        with store_errors(path):
            self._file = path.open("ab", buffering=0)
            if found:
                with path.open("rb") as file:
                    while block := file.read(BLOCK):
                        self._hash.update(block)

    def append(self, data: bytes) -> None:
        """Take what comes next.

        Raises:
            RefusalError: if it is more than the part has.
            StoreError: if it cannot be written.
        """
        if self.taken + len(data) > self._num_bytes:
            raise rejection(pb.LENGTH, "data", f"{self._num_bytes} bytes", f"{self.taken + len(data)} or more")
        with store_errors(self.path):
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        self._hash.update(data)
        self.taken += len(data)

    def finish(self) -> bool:
        """Return whether the part is whole.

        Raises:
            RefusalError: if it has another digest; then the file is gone, and the part may be sent from its beginning.
        """
        if self.taken < self._num_bytes:
            return False
        if (found := self._hash.digest()) != self._digest:
            self.path.unlink(missing_ok=True)
            raise rejection(pb.DIGEST, "part", self._digest.hex()[:16], found.hex()[:16])
        return True

    def close(self) -> None:
        self._file.close()


def map_file(path: Path) -> memoryview:
    """Return the bytes of a file without reading them; they stay when the file is removed.

    Raises:
        StoreError: if it cannot be opened.
    """
    with store_errors(path):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if not os.fstat(descriptor).st_size:
                return memoryview(b"")
            return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        finally:
            os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free on the disk of a folder."""
    return shutil.disk_usage(folder).free


def sweep(folder: Path, *, older_s: float) -> None:
    """Remove parts that nobody has added to for so long."""
    now = time.time()
    with store_errors(folder):
        for path in folder.iterdir():
            if path.is_file() and now - path.stat().st_mtime > older_s:
                path.unlink(missing_ok=True)
