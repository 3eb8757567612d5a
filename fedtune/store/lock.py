"""One writer for a run directory: the lock that a process holds while it conducts the run."""

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
"""`holder` holds a lock for an instant too, which must not keep a run from starting."""


@contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the lock of a run directory. It ends with the process, however that ends.

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
        os.close(descriptor)  # which gives the lock back; the file stays, or two could hold locks of one name


def holder(run: Path) -> str | None:
    """Return the process that writes a run directory, as it gave its number; None if nobody does.

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
