"""Parts of replies on the server's disk while they arrive: continued after a cut, and hashed before they are used."""

from __future__ import annotations

import mmap
import os
import shutil
import time
from hashlib import sha256
from io import FileIO
from pathlib import Path

from fedtune.link.rejections import rejection
from fedtune.store.files import open_private, store_errors
from fedtune.wire.v1 import link_pb2 as pb

BLOCK = 2**20
"""Bytes that are read and hashed at once."""


def part_path(folder: Path, client: str, digest: bytes) -> Path:
    """Return where a part of a client's reply lies; names of the roster are safe as names of files."""
    # The digest in the name: a client that replies anew must not append to the bytes of its earlier reply.
    return folder / f"{client}-{digest.hex()}"


def stored_bytes(path: Path) -> int:
    """Return how many bytes of a part have arrived."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class IncomingUpload:
    """A part that is arriving: appended to its file, and hashed as it comes."""

    def __init__(self, path: Path, part: pb.Part, offset: int) -> None:
        """Open the file to append to it; what it holds already is hashed again.

        Nothing is synced: receipts are given for what the journal holds, and what a crash damages here is sent again.

        Raises:
            RejectionError: if the sender does not start where the file ends.
            StoreError: if the file cannot be opened.
        """
        stored = stored_bytes(path)
        if offset != stored:
            raise rejection(pb.OFFSET, "offset", stored, offset)
        self.path, self.received_bytes, self._num_bytes, self._digest = path, stored, part.num_bytes, part.digest
        self._hash = sha256()
        with store_errors(path):
            # Unbuffered: after a cut the next transfer goes on at the size of the file.
            self._file = FileIO(path, "ab", opener=open_private)
            if stored:
                with path.open("rb") as file:
                    while block := file.read(BLOCK):
                        self._hash.update(block)

    def append(self, data: bytes) -> None:
        """Write the next bytes.

        Raises:
            RejectionError: if it is more than the part has.
            StoreError: if it cannot be written.
        """
        total = self.received_bytes + len(data)
        # Else a client could fill the disk.
        if total > self._num_bytes:
            raise rejection(pb.LENGTH, "data", f"{self._num_bytes} bytes", f"{total} or more")
        with store_errors(self.path):
            # An unbuffered file may take only a part of the bytes at a time.
            rest = memoryview(data)
            while rest:
                rest = rest[self._file.write(rest) :]
        self._hash.update(data)
        self.received_bytes += len(data)

    def finish(self) -> bool:
        """Return whether the part is whole.

        Raises:
            RejectionError: if it has another digest; its file is then removed, and it can be sent from the beginning.
        """
        if self.received_bytes < self._num_bytes:
            return False
        if (actual := self._hash.digest()) != self._digest:
            self.path.unlink(missing_ok=True)
            raise rejection(pb.DIGEST, "part", self._digest.hex()[:16], actual.hex()[:16])
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
            # mmap refuses a file without bytes.
            if not os.fstat(descriptor).st_size:
                return memoryview(b"")
            return memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        finally:
            # The map needs none: with one for every reply, a large round would pass the limit of open files.
            os.close(descriptor)


def free_bytes(folder: Path) -> int:
    """Return the bytes that are free on the disk of a folder."""
    return shutil.disk_usage(folder).free


def remove_stale_parts(folder: Path, *, older_s: float) -> None:
    """Remove parts to which no bytes were added for so many seconds."""
    now = time.time()
    with store_errors(folder):
        for path in folder.iterdir():
            if path.is_file() and now - path.stat().st_mtime > older_s:
                path.unlink(missing_ok=True)
