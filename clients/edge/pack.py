"""Pack a folder with a program into one file that unpacks itself once: header.sh, and behind it a tar archive."""

from __future__ import annotations

import gzip
import hashlib
import io
import re
import stat
import tarfile
from pathlib import Path

HEADER = Path(__file__).with_name("header.sh")
SUMS = ".sha256sums"


def glibc_version(tree: Path) -> str:
    """Return the oldest glibc that every library of a tree runs with."""
    needed = {(2, 17)}
    for path in files_of(tree):
        body = path.read_bytes()
        if body.startswith(b"\x7fELF"):
            needed |= {(2, int(minor)) for minor in re.findall(rb"\bGLIBC_2\.(\d+)", body)}
    return ".".join(map(str, max(needed)))


def files_of(tree: Path) -> list[Path]:
    return sorted(path for path in tree.rglob("*") if path.is_file() and not path.is_symlink())


def list_digests(tree: Path) -> str:
    """Return a line for each file of a tree, in the format of sha256sum."""
    return "".join(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(tree).as_posix()}\n"
        for path in files_of(tree)
        if path.name != SUMS
    )


def archive(tree: Path, *, epoch: int) -> bytes:
    """Return a tree as a gzipped tar archive whose bytes follow from its contents: no owner, no order of a disk."""
    (tree / SUMS).write_text(list_digests(tree))

    def normalised(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        entry.mtime = epoch
        entry.mode = 0o755 if entry.isdir() or entry.mode & stat.S_IXUSR else 0o644
        return entry

    plain = io.BytesIO()
    # USTAR: the tar of a router's busybox reads it, and refuses nothing that is in it.
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(tree.rglob("*")):
            tar.add(path, path.relative_to(tree).as_posix(), recursive=False, filter=normalised)
    return gzip.compress(plain.getvalue(), 9, mtime=0)


def pack(tree: Path, out: Path, *, name: str, version: str, arch: str, epoch: int) -> Path:
    """Write `NAME-VERSION-ARCH` and its line of SHA256SUMS to a folder, and return the file.

    Args:
        tree: holds the program, an executable called `name` that answers `version`.
        out: folder of the result.
        name: of the program.
        version: of the program.
        arch: as `uname -m` says it.
        epoch: time of every file, in seconds: that of the source, so that a build can be repeated.
    """
    body = archive(tree, epoch=epoch)
    values = {
        "NAME": name,
        "VERSION": version,
        "ARCH": arch,
        "GLIBC": glibc_version(tree),
        "DIGEST": hashlib.sha256(body).hexdigest(),
        "MEGABYTES": str(-(-sum(path.stat().st_size for path in files_of(tree)) // 1_000_000)),
    }
    text = HEADER.read_text()
    for key, value in values.items():
        text = text.replace(f"@{key}@", value)
    length = 0
    while length != (length := len(text.replace("@FIRST_BYTE@", str(length + 1)).encode())):
        pass
    text = text.replace("@FIRST_BYTE@", str(length + 1))
    path = out / f"{name}-{version}-{arch}"
    out.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() + body)
    path.chmod(0o755)
    return path


def write_sums(out: Path, names: list[str]) -> None:
    """Write SHA256SUMS of files of a folder, those of other programs that are there already among them."""
    sums = out / "SHA256SUMS"
    lines = sums.read_text().splitlines() if sums.exists() else []
    known = {line.split("  ", 1)[1] for line in lines} | set(names)
    text = "".join(
        f"{hashlib.sha256((out / name).read_bytes()).hexdigest()}  {name}\n"
        for name in sorted(known)
        if (out / name).exists()
    )
    sums.write_text(text)
