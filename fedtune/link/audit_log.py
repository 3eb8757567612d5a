"""What happened on the link, told once and kept in a chain: who came, what was asked, what left, what was refused."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from fedtune.errors import StoreError
from fedtune.store import journal
from fedtune.store.journal import BEFORE_FIRST, End, Journal


class RecordEvent(Protocol):
    """Told what happens: a kind, and integers and strings that belong to it; never a secret and nothing of the data."""

    def __call__(self, kind: str, **fields: int | str) -> None: ...


def silent(kind: str, **fields: int | str) -> None:
    """Tell nobody."""


def both(*tells: RecordEvent) -> RecordEvent:
    """Return what tells each of them."""

    def tell(kind: str, **fields: int | str) -> None:
        for one in tells:
            one(kind, **fields)

    return tell


@dataclass(frozen=True)
class Entry:
    """One line of an audit log."""

    n: int
    unix_ms: int
    kind: str
    fields: Mapping[str, Any]


@dataclass(frozen=True)
class Log:
    """An audit log as it was read, its chain verified."""

    entries: Sequence[Entry]
    head: str
    """SHA-256 (hex) of the last record: who keeps it can tell later whether anything before it was changed."""


class Audit:
    """The end of an audit log; a thread of its own writes and syncs, so that nobody waits for the disk."""

    def __init__(self, path: Path, *, failed: Callable[[StoreError], None] = lambda error: None) -> None:
        """Open the log, and cut off what a crash left of a record.

        Args:
            path: of the log.
            failed: told once, in the writing thread, if it cannot be written any more.

        Raises:
            StoreError: if it cannot be opened, or its chain is broken.
        """
        end = journal.read(path, lambda record: None) if path.exists() else End()
        self._journal, self._failed = Journal(path, end), failed
        self._queue: queue.SimpleQueue[tuple[str, Mapping[str, int | str]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._write, name="fedtune audit", daemon=True)
        self._thread.start()

    def tell(self, kind: str, **fields: int | str) -> None:
        """Keep an entry; returns at once."""
        self._queue.put((kind, fields))

    def _write(self) -> None:
        over = False
        while not over:
            entries = [self._queue.get()]
            with suppress(queue.Empty):  # what has come meanwhile is synced together
                while True:
                    entries.append(self._queue.get_nowait())
            over = None in entries
            if self._journal.usable:
                try:
                    self._journal.extend([one for one in entries if one is not None])
                except StoreError as error:
                    self._failed(error)

    def close(self) -> None:
        """Write what waits, and close the file."""
        self._queue.put(None)
        self._thread.join()
        self._journal.close()


def read(path: Path) -> Log:
    """Return an audit log; safe beside the process that writes it.

    Raises:
        StoreError: naming the first entry that is damaged or breaks the chain.
    """
    if not path.exists():
        raise StoreError(f"{path}: expected an audit log; got nothing; it is made by fedtune serve and fedtune join")
    entries = list[Entry]()
    end = journal.read(path, lambda one: entries.append(Entry(one.n, one.unix_ms, one.kind, one.fields)))
    return Log(entries, end.head if entries else BEFORE_FIRST)


def heads(path: Path) -> frozenset[str]:
    """Return the digest (hex) of every record of a log, any of which somebody may have noted.

    Raises:
        StoreError: if it is damaged.
    """
    found = set[str]()
    end = journal.read(path, lambda one: found.add(one.prev))
    return frozenset(found | {end.head})
