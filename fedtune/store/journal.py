"""The journal of a run: an append-only file of hash-chained records, each on the disk before what it announces happens.

A record is `u32 length | u32 crc32 | JSON`, little-endian; the JSON has sorted keys, is ASCII, and holds integers and
strings only. Beside the fields of its kind it holds `n`, `prev` (SHA-256 of the JSON before it), `epoch` (which of the
run's processes wrote it), `kind`, and `unix_ms`, which is for people and never read by the program.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from struct import Struct
from typing import Any, BinaryIO
from zlib import crc32

from fedtune.errors import StoreError
from fedtune.store import files

FRONT = Struct("<II")
"""Length and CRC-32 of the JSON."""
MAX_RECORD_BYTES = 16 * 1024 * 1024
"""A round of a hundred thousand clients fits."""
BEFORE_FIRST = "0" * 64
OWN_FIELDS = ("epoch", "kind", "n", "prev", "unix_ms")


@dataclass(frozen=True, slots=True)
class Record:
    """One record, as it was read."""

    n: int
    epoch: int
    kind: str
    fields: Mapping[str, Any]
    """Those of its kind."""
    unix_ms: int = field(default=0, compare=False)
    """When it was written, by the clock of the machine; no decision depends on it."""
    prev: str = field(default=BEFORE_FIRST, compare=False)
    """SHA-256 (hex) of the JSON of the record before it."""


@dataclass(frozen=True)
class End:
    """Where the whole records of a journal end, which is where the next one goes."""

    count: int = 0
    head: str = BEFORE_FIRST
    """SHA-256 (hex) of the last record's JSON."""
    epoch: int = 0
    """Of the last record."""
    num_bytes: int = 0
    torn_bytes: int = 0
    """Bytes behind them: what a crash left of one more record."""


def read(path: Path, apply: Callable[[Record], None], *, after: End | None = None) -> End:
    """Call `apply` with every whole record, in order, and return where they end; safe beside a process that writes.

    With `after`, the first record must follow those of another file, which ends there.

    A last record that is incomplete, or does not match its checksum, was being written when the process died: it is
    left out. Nothing else may be wrong.

    Raises:
        StoreError: naming the first record that is damaged or breaks the chain; or raised by `apply`.
    """
    with files.store_errors(path), path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        before = after or End()
        n, head, epoch, at = before.count, before.head, before.epoch, 0
        while at < size:
            try:
                data = read_whole(file, size - at)
                if data is None:
                    break
                record = parse_record(data, n, head, epoch)
            except StoreError as error:
                damage = "the journal is damaged: put back a copy of the run directory"
                raise StoreError(f"{path}, record {n}: {error}; {damage}") from error
            apply(record)
            n, head, epoch, at = n + 1, sha256(data).hexdigest(), record.epoch, at + FRONT.size + len(data)
        return End(n, head, epoch, at, size - at)


def read_whole(file: BinaryIO, rest: int) -> bytes | None:
    """Return the JSON of the next record if it is what its checksum says, or None if its writing was cut short.

    Args:
        file: to read from.
        rest: bytes of it that are left.

    Raises:
        StoreError: if it was damaged later: a torn record has no other behind it.
    """
    front = file.read(min(FRONT.size, rest))
    if len(front) < FRONT.size:
        return None
    length, checksum = FRONT.unpack(front)
    if not 0 < length <= MAX_RECORD_BYTES:
        # A file may have grown on the disk before its bytes got there: then they are zeros, up to the end.
        if rest <= FRONT.size + MAX_RECORD_BYTES and not any(front + file.read(rest - FRONT.size)):
            return None
        raise StoreError(f"expected a record of 1 to {MAX_RECORD_BYTES} bytes; got one of {length}")
    data = file.read(min(length, rest - FRONT.size))
    if len(data) == length and crc32(data) == checksum:
        return data
    if FRONT.size + length < rest:
        raise StoreError(f"expected the checksum {checksum:08x}; got {crc32(data):08x}")
    if len(data) < length and complete(data):
        # The length is damaged, the record is not torn: to cut here could lose records whose updates are acknowledged.
        raise StoreError(f"expected {length} bytes; got a record that ends earlier within {len(data)}")
    return None


def complete(data: bytes) -> bool:
    """Return whether the bytes begin with a whole JSON object; a part of a longer object never does."""
    try:
        json.JSONDecoder().raw_decode(data.decode("latin-1"))
    except ValueError:
        return False
    return True


def parse_record(data: bytes, n: int, head: str, epoch: int) -> Record:
    """Return a record that must have the number `n`, follow the one of digest `head`, and be of `epoch` or a later one.

    Raises:
        StoreError: if it is or does not.
    """
    try:
        fields = json.loads(data.decode("ascii"))
        now, kind, number, prev, unix_ms = [fields.pop(name) for name in OWN_FIELDS]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StoreError(f"expected an object with {', '.join(OWN_FIELDS)}; got {error!r}") from error
    if number != n or prev != head:
        raise StoreError(f"expected number {n} after the record {head[:12]}; got {number!r} after {str(prev)[:12]}")
    if not isinstance(now, int) or now < epoch or not isinstance(kind, str):
        raise StoreError(f"expected a kind, and an epoch from {epoch}; got {kind!r}, {now!r}")
    return Record(n, now, kind, fields, unix_ms if isinstance(unix_ms, int) else 0, prev)


class Journal:
    """The end of a journal's file, to append to. After a failed write it refuses more: what is on disk is unknown."""

    def __init__(self, path: Path, end: End) -> None:
        """Open the file behind its last whole record, and cut off what a crash left of another.

        Raises:
            StoreError: if it cannot be written.
        """
        self._path, self._end, self._usable = path, end, False
        self.epoch = end.epoch + 1
        with files.store_errors(path):
            self._descriptor = files.append_to(path)
            try:
                if end.num_bytes == 0:
                    files.sync_folder(path.parent)  # before the first record: a durable record needs a durable name
                if end.torn_bytes:
                    files.truncate(self._descriptor, end.num_bytes)
                # A killed process may have left whole records that are not synced. This process acts on them, so they
                # must not vanish in a later power cut.
                files.sync(self._descriptor)
            except BaseException:
                self.close()
                raise
        self._usable = True

    @property
    def usable(self) -> bool:
        """Whether more can be appended."""
        return self._usable

    @property
    def end(self) -> End:
        """Where the next record goes."""
        return self._end

    def append(self, kind: str, fields: Mapping[str, Any]) -> None:
        """Append a record and sync it to the disk.

        Raises:
            StoreError: if that failed, now or before; if another process has written; or if the record is too large
                or holds anything but integers and strings.
        """
        self.extend([(kind, fields)])

    def extend(self, records: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
        """Append several records and sync them once; a crash in between may leave the first few of them.

        Raises:
            StoreError: as for `append`; then none of them is there.
        """
        if not self._usable:
            raise StoreError(
                f"{self._path}: expected a journal that can be written; an earlier write failed; "
                "end this process, see to the disk, and go on with --resume"
            )
        end, written = self._end, list[bytes]()
        for kind, fields in records:
            own = {
                "n": end.count,
                "prev": end.head,
                "epoch": self.epoch,
                "kind": kind,
                "unix_ms": time.time_ns() // 10**6,
            }
            data = canonical({**fields, **own})
            if len(data) > MAX_RECORD_BYTES:
                raise StoreError(
                    f"{self._path}: expected a record of at most {MAX_RECORD_BYTES} bytes; got {len(data)} ({kind}); "
                    "lower rounds.cohort"
                )
            written.append(FRONT.pack(len(data), crc32(data)) + data)
            head, num_bytes = sha256(data).hexdigest(), end.num_bytes + len(written[-1])
            end = End(end.count + 1, head, self.epoch, num_bytes)
        with files.store_errors(self._path):
            if os.fstat(self._descriptor).st_size != self._end.num_bytes:
                self._usable = False
                raise StoreError(
                    f"{self._path}: expected {self._end.num_bytes} bytes, as this process left it; another one has "
                    "written; end all but one"
                )
            self._usable = False  # if anything interrupts the next lines, no record may follow half a record
            try:
                files.write(self._descriptor, b"".join(written))
                files.sync(self._descriptor)
            except OSError:
                with suppress(OSError):  # if that fails too, the next process that opens the journal cuts it off
                    files.truncate(self._descriptor, self._end.num_bytes)
                raise
            self._usable = True
        self._end = end

    def close(self) -> None:
        """Close the file, once; every record in it is synced already."""
        self._usable = False
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def canonical(fields: Mapping[str, Any]) -> bytes:
    """Return the one form of a record's JSON.

    Raises:
        StoreError: if it holds anything but integers, strings, and lists and mappings of them.
    """
    check_plain(fields, "record")
    return json.dumps(fields, sort_keys=True, ensure_ascii=True, separators=(",", ":")).encode()


def check_plain(value: Any, where: str) -> None:
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        for key, part in value.items():
            check_plain(part, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for part in value:
            check_plain(part, where)
    elif isinstance(value, bool) or not isinstance(value, int | str):
        raise StoreError(
            f"{where}: expected integers, strings, and lists or mappings of them; got {value!r}; write it as a string"
        )
