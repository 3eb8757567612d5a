"""Files that are either whole or absent: written beside, synced, and renamed into place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedtune.errors import StoreError


@contextmanager
def guarded(path: Path) -> Iterator[None]:
    """Turn what the operating system says about a path into a StoreError that names it."""
    try:
        yield
    except OSError as error:
        raise StoreError(f"{path}: expected to read or write it; {error.strerror or error}; {advice(error)}") from error
    except SafetensorError as error:
        # It keeps of the operating system's error the text alone.
        raise StoreError(f"{path}: expected to write tensors; {error}; check the space and the permissions") from error


def advice(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "check its permissions, or choose another folder with --out"
    if error.errno in (28, 122):  # ENOSPC, EDQUOT
        return "free some space and try again; what was written before is whole"
    return "check the path"


def write_text(path: Path, text: str) -> None:
    """Replace a file's content in one step; a crash leaves the old file or the new one."""
    with guarded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


def append_line(path: Path, line: str) -> None:
    """Append one line and sync it to the disk; a line that does not fit whole is taken back."""
    with guarded(path), path.open("ab") as file:
        size = file.tell()
        try:
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def settle(file: Path) -> None:
    """Sync a written file and let everyone read it: safetensors makes its files for the owner alone."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    file.chmod(0o644)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which takes the place of `path` when the block ends without an error."""
    with guarded(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    settle(file)
            temporary.chmod(0o755)
            old = temporary.with_name(temporary.name + ".old")
            if path.exists():
                path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
