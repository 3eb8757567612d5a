"""`fedtune.json`, the manifest of a result's folder: SHA-256 and size of every other file, checked by each reader.

It is written last, so a folder that a crash left half written has none and passes for nothing. It has one spelling and
carries its own SHA-256: no byte of it, and none of the files that it lists, changes unseen. That finds damage and
mistakes; a change of both the files and the manifest is found by a signature alone (`fedtune verify`).
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import file_digest, sha256
from io import BufferedReader
from pathlib import Path
from typing import Any

from fedtune.errors import StoreError
from fedtune.store import files
from fedtune.store.files import store_errors

NAME, SIGNATURE, OPENSSF = "fedtune.json", "manifest.dsse", "model.sig"
"""The manifest, the envelope that signs it, and a signature in the OpenSSF format; none of them is listed in it."""
KEY, FORMAT = "manifest", 1
MAX_BYTES = 64 * 1024 * 1024
"""A run of a hundred thousand clients fits."""
BEFORE_MANIFESTS = ("0.1.", "0.2.")
"""Starts of the versions that wrote a `fedtune.json` without digests."""
ADVICE = "put back a copy of the folder, or write it again from its run"


@dataclass(frozen=True)
class FileFacts:
    """What a manifest says of a file."""

    sha256: str
    """Hex."""
    num_bytes: int


@dataclass(frozen=True)
class ResultFolder:
    """A folder whose manifest holds; the files in it are checked as they are read."""

    path: Path
    facts: Mapping[str, Any]
    """What it says beside the digests: the run it is of, its base, what it was made from."""
    listed: Mapping[str, FileFacts] | None = field(default=None, repr=False)
    """By name below the folder; None where it was written by a release without manifests."""
    digest: str = ""
    """SHA-256 (hex) of the manifest's bytes."""

    @property
    def remark(self) -> str:
        """Why its files are not checked; empty if they are."""
        written = f"written by fedtune {self.facts.get('fedtune')}, which listed no digests"
        return f"{self.path}: not checked: {written}" if self.listed is None else ""

    def read(self, name: str) -> bytes:
        """Return the bytes of a file, checked as they are read.

        Raises:
            StoreError: if it is missing, a link, or another one than the manifest lists.
        """
        if self.listed is None:
            with store_errors(self.path / name):
                return (self.path / name).read_bytes()
        with store_errors(self.path / name), open_plain(self.path / name) as file:
            listed = self._entry(name)
            # One byte more than listed is enough to refuse a file that is too large.
            data = file.read(listed.num_bytes + 1)
        self._compare(name, FileFacts(sha256(data).hexdigest(), len(data)), listed)
        return data

    def check(self, names: Collection[str] | None = None) -> None:
        """Read these files once, in pieces, and check them; without names all that are listed.

        Raises:
            StoreError: naming the first that is missing, a link, or another one than the manifest lists.
        """
        for name in sorted(self.listed or ()) if names is None else names:
            if self.listed is not None:
                listed = self._entry(name)
                self._compare(name, facts_of(self.path / name), listed)

    def _entry(self, name: str) -> FileFacts:
        assert self.listed is not None
        if name not in self.listed:
            raise StoreError(
                f"{self.path}: expected {NAME} to list {name}; it lists {first_names(self.listed)}; {ADVICE}"
            )
        return self.listed[name]

    def _compare(self, name: str, actual: FileFacts, listed: FileFacts) -> None:
        if actual.num_bytes != listed.num_bytes:
            size = "more" if actual.num_bytes > listed.num_bytes else str(actual.num_bytes)
            raise StoreError(
                f"{self.path / name}: expected the {listed.num_bytes} bytes of {NAME}; got {size}; {ADVICE}"
            )
        if actual != listed:
            expected, got = listed.sha256[:12], actual.sha256[:12]
            raise StoreError(f"{self.path / name}: expected the digest {expected}, as in {NAME}; got {got}; {ADVICE}")


def write(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write the manifest of a folder's files, as the last of them.

    Args:
        folder: of `files.new_folder`, or one within it.
        facts: what it says beside the digests.
    """
    listed = {name: facts_of(folder / name) for name in sorted(plain_files(folder))}
    files.fill(folder / NAME, encode(facts, listed))


def encode(facts: Mapping[str, Any], listed: Mapping[str, FileFacts]) -> bytes:
    """Return the one spelling of a manifest."""
    entries = {name: {"sha256": file.sha256, "bytes": file.num_bytes} for name, file in sorted(listed.items())}
    others = {key: value for key, value in facts.items() if key != KEY}
    table: dict[str, Any] = {"format": FORMAT, "files": entries}
    table["sha256"] = sha256(spell({**others, KEY: table})).hexdigest()
    return spell({**others, KEY: table})


def spell(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def open_folder(path: Path) -> ResultFolder:
    """Return a folder of a result after a check of its manifest and of the names in it; the one door to results.

    Files whose names begin with a dot are neither listed nor looked at: no program loads them.

    Raises:
        StoreError: if the manifest is missing or damaged, or the folder holds a file more or less, or a link.
    """
    opened = parse(read_bounded(path / NAME), path)
    if opened.listed is not None:
        present = set(plain_files(path))
        if missing := sorted(opened.listed.keys() - present):
            raise StoreError(f"{path / missing[0]}: expected this file, which {NAME} lists; got none; {ADVICE}")
        if extra := sorted(present - opened.listed.keys()):
            # Other programs load by name: a template, a pickle or code beside the adapter would be taken for a part.
            raise StoreError(f"{path / extra[0]}: expected only the files that {NAME} lists; move it elsewhere")
    return opened


def read_bounded(path: Path) -> bytes:
    try:
        with store_errors(path), open_plain(path) as file:
            data = file.read(MAX_BYTES + 1)
    except StoreError as error:
        if not os.path.lexists(path):
            raise StoreError(f"{path}: expected this file, which is written last; got none; {ADVICE}") from error
        raise
    if len(data) > MAX_BYTES:
        raise StoreError(f"{path}: expected at most {MAX_BYTES} bytes; got more; {ADVICE}")
    return data


def parse(data: bytes, path: Path) -> ResultFolder:
    """Return the folder that the bytes of a manifest describe.

    Raises:
        StoreError: naming what is wrong with them.
    """
    file = path / NAME
    content = json_object(data, file)
    if KEY not in content:
        version = str(content.get("fedtune", ""))
        if version.startswith(BEFORE_MANIFESTS):
            return ResultFolder(path, content)
        raise StoreError(f"{file}: expected the digests of the files beside it; got none; {ADVICE}")
    facts = {key: value for key, value in content.items() if key != KEY}
    try:
        table = content[KEY]
        layout = table["format"]
        listed = {
            str(name): FileFacts(str(entry["sha256"]), int(entry["bytes"])) for name, entry in table["files"].items()
        }
        whole = layout != FORMAT or encode(facts, listed) == data
    except (KeyError, TypeError, ValueError, AttributeError):
        whole = False
    # White space, the order of keys and the digests' own digest count too: no byte is free to change.
    if not whole:
        raise StoreError(f"{file}: expected it as it was written, with its own digest; got another text; {ADVICE}")
    if layout != FORMAT:
        raise StoreError(
            f"{file}: expected a manifest of format {FORMAT}; got {layout!r}; use the fedtune that wrote it"
        )
    return ResultFolder(path, facts, listed, sha256(data).hexdigest())


def json_object(data: bytes, path: Path) -> dict[str, Any]:
    """Return the JSON object in the bytes of a file.

    Raises:
        StoreError: if they are none.
    """
    try:
        # Of bytes, the parser guesses an encoding and imports its codec.
        content = json.loads(data.decode("utf-8"))
    # RecursionError: brackets within brackets, thousands deep.
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path}: expected JSON; got {str(error)[:100]}; {ADVICE}") from error
    if not isinstance(content, dict):
        raise StoreError(f"{path}: expected a JSON object; got a {type(content).__name__}; {ADVICE}")
    return content


def plain_files(folder: Path) -> Iterator[str]:
    """Yield the names below a folder of all files but the manifest, its signature, and those that begin with a dot.

    Raises:
        StoreError: naming the first that is neither a file nor a folder.
    """
    with store_errors(folder):
        yield from _plain_files(folder, "")


def _plain_files(folder: Path, prefix: str) -> Iterator[str]:
    with os.scandir(folder) as listing:
        entries = sorted(listing, key=lambda entry: entry.name)
    for entry in entries:
        if entry.name.startswith(".") or (not prefix and entry.name in (NAME, SIGNATURE, OPENSSF)):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _plain_files(folder / entry.name, f"{prefix}{entry.name}/")
        elif entry.is_file(follow_symlinks=False):
            yield prefix + entry.name
        else:
            # What a link leads to may change without a trace in this folder.
            raise StoreError(
                f"{folder / entry.name}: expected a file; got a link or a device; copy the folder with cp -RL"
            )


def facts_of(path: Path) -> FileFacts:
    """Return digest and size of a file, read in pieces."""
    with store_errors(path), open_plain(path) as file:
        digest = file_digest(file, "sha256").hexdigest()
        return FileFacts(digest, os.fstat(file.fileno()).st_size)


def open_plain(path: Path) -> BufferedReader:
    """Open a file to read, and nothing that a link leads to or that is no file."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    file = os.fdopen(descriptor, "rb")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise StoreError(f"{path}: expected a file; got something else; {ADVICE}")
    return file


def source(path: Path) -> Mapping[str, str]:
    """Return what a folder that is made from another one says of it: the digests of its manifest and its signature."""
    digests = {"manifest": sha256(read_bounded(path / NAME)).hexdigest()}
    if (path / SIGNATURE).is_file():
        digests["signature"] = sha256(read_bounded(path / SIGNATURE)).hexdigest()
    return digests


def first_names(names: Collection[str], most: int = 3) -> str:
    """Return some names in words."""
    few: Sequence[str] = sorted(names)[:most]
    return ", ".join(few) + ", ..." * (len(names) > most) if names else "none"
