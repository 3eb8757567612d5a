"""Events of the link, and the audit log that keeps them in a chain of hashes."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedtune.errors import StoreError
from fedtune.link import audit_files
from fedtune.store.journal import BEFORE_FIRST, Journal

LOGGER = logging.getLogger("fedtune.link")


class RecordEvent(Protocol):
    """Receives an event: its kind, and integers and strings as fields; never a secret, and nothing of the data."""

    def __call__(self, kind: str, **fields: int | str) -> None: ...


def ignore_event(kind: str, **fields: int | str) -> None:
    """Drop an event."""


def log_event(kind: str, **fields: int | str) -> None:
    """Pass an event to the logger `fedtune.link` at level INFO; it is silent unless the application configures it."""
    LOGGER.info("%s %s", kind, fields)


def record_to_all(*recorders: RecordEvent) -> RecordEvent:
    """Return a function that passes each event to all of these."""

    def record(kind: str, **fields: int | str) -> None:
        for recorder in recorders:
            recorder(kind, **fields)

    return record


@dataclass(frozen=True)
class Entry:
    """One line of an audit log."""

    n: int
    unix_ms: int
    kind: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class AuditHistory:
    """The entries of an audit log whose chain has been verified."""

    entries: Sequence[Entry]
    head: str
    """SHA-256 (hex) of the last record: noted elsewhere, it proves later that nothing before it was changed."""


class AuditLog:
    """Appends to an audit log, file by file; a thread of its own writes and syncs, so that no caller waits for it."""

    def __init__(
        self,
        path: Path,
        *,
        on_failure: Callable[[StoreError], None] = lambda error: None,
        full_bytes: int = audit_files.FULL_BYTES,
    ) -> None:
        """Open the log, and cut off what a crash left of a record.

        Args:
            path: of the log's newest file.
            on_failure: called once, in the writing thread, if it cannot be written any more.
            full_bytes: from which on the log goes on in a new file.

        Raises:
            StoreError: if it cannot be opened, or its chain is broken.
        """
        # Read whole: every record carries the digest of the one before it, and a broken chain must not be continued.
        end = audit_files.read(path, lambda record: None)
        self._path, self._journal, self._on_failure, self._full_bytes = path, Journal(path, end), on_failure, full_bytes
        # Without a bound: no event may be dropped, and no round may wait for the disk.
        self._queue: queue.SimpleQueue[tuple[str, Mapping[str, int | str]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="fedtune audit", daemon=True)
        self._thread.start()

    def record(self, kind: str, **fields: int | str) -> None:
        """Append an event; returns at once."""
        self._queue.put((kind, fields))

    def _write(self) -> None:
        over = False
        while not over:
            entries = [self._queue.get()]
            # One sync for all that has come meanwhile: a round has many events.
            with suppress(queue.Empty):
                while True:
                    entries.append(self._queue.get_nowait())
            over = None in entries
            # After a failed write the end of the file is unknown: further events would break the chain.
            if self._journal.usable:
                try:
                    self._journal.extend([entry for entry in entries if entry is not None])
                    if self._journal.end.num_bytes >= self._full_bytes:
                        self._journal = audit_files.begin_next(self._path, self._journal)
                except StoreError as error:
                    self._on_failure(error)

    def close(self) -> None:
        """Write what is queued, and close the file."""
        self._queue.put(None)
        self._thread.join()
        self._journal.close()


def read_audit_log(path: Path) -> AuditHistory:
    """Return an audit log, verified; safe while another process writes it.

    Raises:
        StoreError: naming the first entry that is damaged or breaks the chain.
    """
    if not audit_files.exists(path):
        raise StoreError(f"{path}: expected an audit log; got nothing; it is made by fedtune serve and fedtune join")
    entries = list[Entry]()
    end = audit_files.read(path, lambda line: entries.append(Entry(line.n, line.unix_ms, line.kind, line.fields)))
    return AuditHistory(entries, end.head if entries else BEFORE_FIRST)


def record_digests(path: Path) -> frozenset[str]:
    """Return the digest (hex) of every record of a log, any of which may have been noted as its head.

    Raises:
        StoreError: if it is damaged.
    """
    digests = set[str]()
    # A record names the digest of the one before it; that of the last record is the end of the chain.
    end = audit_files.read(path, lambda record: digests.add(record.prev))
    return frozenset(digests | {end.head})
