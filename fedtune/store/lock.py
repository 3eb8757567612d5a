"""One writer for a run directory: the file lock of the process that runs it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.store import files

TRIES, PAUSE_S = 5, 0.02
"""`holder` takes the lock for an instant too: a run that starts just then must try again, not fail."""


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory; the kernel releases it with the process, even a killed one.

    Raises:
        StoreError: naming the process that holds it.
    """
    path = run / "lock"
    with files.store_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with files.store_errors(path):
            for attempt in range(1, TRIES + 1):
                if try_lock(descriptor, fcntl.LOCK_EX):
                    break
                if attempt == TRIES:
                    raise StoreError(
                        f"{run}: expected that no other process writes it; process {written_pid(descriptor)} does; "
                        "wait for it, or end it"
                    )
                time.sleep(PAUSE_S)
            files.truncate(descriptor, 0)
            files.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(
            descriptor
        )  # releases the lock. The file stays: removed and made anew, it would allow two locks of one name


def holder(run: Path) -> str | None:
    """Return the number of the process that writes a run directory, as it wrote it; None if there is none.

    Raises:
        StoreError: if the lock cannot be read.
    """
    path = run / "lock"
    with files.store_errors(path):
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            return None if try_lock(descriptor, fcntl.LOCK_SH) else written_pid(descriptor)
        finally:
            os.close(descriptor)


def try_lock(descriptor: int, kind: int) -> bool:
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def written_pid(descriptor: int) -> str:
    return os.pread(descriptor, 32, 0).decode("ascii", "replace").strip() or "(of unknown number)"
