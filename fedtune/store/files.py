"""Durable writes: a file or folder is written under another name, synced, and renamed into place."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from fedtune.errors import StoreError

PARTIAL = ".partial"
"""End of the name of a file or folder that is not renamed into place yet."""


@contextmanager
def store_errors(path: Path) -> Iterator[None]:
    """Turn an error of the operating system into a StoreError that names the path."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: expected to read or write it; {error.strerror or error}; {advice(error)}") from error
    except SafetensorError as error:
        # safetensors passes on the text of the operating system's error, not its number.
        raise StoreError(f"{path}: expected to write tensors; {error}; check the space and the permissions") from error


def advice(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "check its permissions, or choose another folder with --out"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space and try again, a run with --resume; what was written before is whole"
    return "check the path"


# The steps that touch the disk. Everything that must survive a crash is made of these alone, called as `files.<step>`:
# tests replace them, and so interrupt a run at every single step (tests/test_crash.py).


def append_to(path: Path) -> int:
    """Open a file to write at its end, creating it if it is missing, and return the descriptor."""
    return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)


def create_beside(path: Path) -> tuple[int, Path]:
    """Create an empty file, readable by the owner alone, that will replace `path`; return descriptor and path."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    return descriptor, Path(name)


def write(descriptor: int, data: bytes | memoryview) -> None:
    """Write all of the data."""
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync(descriptor: int) -> None:
    """Wait until a file's bytes and length are on the disk."""
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Make new, changed and removed names in a folder durable: a synced file may have no name after a crash."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def truncate(descriptor: int, num_bytes: int) -> None:
    os.ftruncate(descriptor, num_bytes)


def rename(source: Path, target: Path) -> None:
    """Move a file over another one, or a folder to a free name, in one step."""
    source.replace(target)


def make_folder(path: Path) -> None:
    """Make a folder that its owner alone can read, whatever the process allows others of new ones."""
    path.mkdir(mode=0o700, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a file, or a folder with its content; nothing happens if it is gone already."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step; a crash leaves the old file or the new one."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes | memoryview, *, mode: int = 0o644) -> None:
    """Replace a file's content in one step, as `write_text` does; until it has this mode only the owner can read it."""
    with store_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = create_beside(path)
        try:
            try:
                write(descriptor, data)
                os.fchmod(descriptor, mode)
                sync(descriptor)  # before the rename: otherwise a power cut can leave the new name with no bytes
            finally:
                os.close(descriptor)
            rename(temporary, path)
        except BaseException:
            remove(temporary)
            raise
        sync_folder(path.parent)  # otherwise a power cut can bring the old file back after others relied on the new


def append_line(path: Path, line: str) -> None:
    """Append one line and sync it to the disk; a line that does not fit whole is cut off again."""
    with store_errors(path):
        descriptor = append_to(path)
        try:
            size = os.fstat(descriptor).st_size
            if size == 0:
                sync_folder(path.parent)  # before the first line, so that a file with lines always has its name
            try:
                write(descriptor, line.encode() + b"\n")
                sync(descriptor)
            except OSError:
                with suppress(OSError):  # if that fails too, a torn last line is left, which readers leave out
                    truncate(descriptor, size)
                raise
        finally:
            os.close(descriptor)


def sync_readable(file: Path) -> None:
    """Sync a written file, and let all users read it: safetensors creates files that only the owner can read."""
    file.chmod(0o644)
    with file.open("rb") as descriptor:
        sync(descriptor.fileno())


def make_private(path: Path, *, below: Path) -> None:
    """Make a folder and those above it, up to one that exists already, readable by their owner alone."""
    for folder in reversed([path, *(parent for parent in path.parents if parent.is_relative_to(below))]):
        folder.mkdir(mode=0o700, exist_ok=True)
        # Of an earlier release, or made while the process allowed others to read.
        if folder.stat().st_mode & 0o077:
            folder.chmod(0o700)


def open_private(path: str, flags: int) -> int:
    """Open a file that its owner alone can read if it is created: an opener for `open`."""
    return os.open(path, flags | os.O_CLOEXEC, 0o600)


def write_private(path: Path, data: bytes | memoryview) -> None:
    """Write a file that its owner alone can read; not synced."""
    with open(path, "wb", opener=open_private) as file:
        file.write(data)


def fill(file: Path, data: bytes) -> None:
    """Write a file into a folder of `new_folder`, which syncs it together with the others."""
    file.write_bytes(data)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which replaces `path` when the block ends without an error."""
    with store_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL))
        old = temporary.with_name(f".old{temporary.name}")
        try:
            yield temporary
            for inner in sorted(temporary.rglob("*")):
                if inner.is_dir():
                    sync_folder(inner)
                elif inner.is_file():
                    sync_readable(inner)
            temporary.chmod(0o755)
            sync_folder(temporary)
            if path.exists():  # a folder cannot be renamed over one that is not empty
                rename(path, old)
            rename(temporary, path)
            sync_folder(path.parent)
            remove(old)
        finally:
            remove(temporary)


def sweep(folder: Path) -> None:
    """Remove unfinished files and folders of a killed process; only under the lock of the run."""
    with store_errors(folder):
        for path in sorted(folder.glob(f".*{PARTIAL}")):
            remove(path)
