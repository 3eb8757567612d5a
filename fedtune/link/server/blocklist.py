"""Clients that a server refuses for now: a file of names and reasons that the operator may edit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.link.rejections import reason_name
from fedtune.store.files import store_errors, write_text
from fedtune.wire.v1 import link_pb2 as pb

HEAD = "# One client per line, then why. Remove its line to admit a client again; a running server looks each second.\n"
RECHECK_S = 1.0
"""At most so often the file's time of change is looked at, since every call of a client asks."""
COUNTED_ROUNDS = 10
"""Refusals in earlier rounds no longer count."""


def read_blocklist(path: Path) -> Mapping[str, str]:
    """Return the reason why each client is blocked.

    Raises:
        StoreError: if the file cannot be read.
    """
    if not path.exists():
        return {}
    with store_errors(path):
        # The operator edits it: a byte that is not UTF-8 must not hide the other lines.
        text = path.read_text(encoding="utf-8", errors="replace")
    lines = [line.split(maxsplit=1) for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return {words[0]: " ".join(words[1:]) or "by the operator" for words in lines}


def write_blocklist(path: Path, blocked: Mapping[str, str]) -> None:
    """Write the file whole."""
    # A reason on one line: what follows a line break would be read as the name of a client.
    write_text(path, HEAD + "".join(f"{name} {' '.join(reason.split())}\n" for name, reason in sorted(blocked.items())))


class Blocklist:
    """The file, read again when it has changed."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        # Two threads: the service asks with every call, and the round loop blocks a client whose update it refused.
        self._path, self._clock, self._lock = path, clock, threading.Lock()
        self._checked_at, self._stamp, self._blocked = float("-inf"), (0, 0, 0), dict[str, str]()

    def reason(self, client: str) -> str:
        """Return why a client is blocked; empty if it is not. A file that cannot be read changes nothing."""
        with self._lock:
            if self._clock() - self._checked_at >= RECHECK_S:
                self._checked_at = self._clock()
                self._reload()
            return self._blocked.get(client, "")

    def block(self, client: str, reason: str) -> None:
        """Block a client, durably.

        Raises:
            StoreError: if the file cannot be written; the client is blocked as long as this process lives.
        """
        with self._lock:
            # Else a line that the operator has just removed would come back.
            self._reload()
            # In memory first: the client is blocked even if the disk is full.
            self._blocked[client] = reason
            write_blocklist(self._path, self._blocked)
            self._stamp = self._file_stamp()

    def _reload(self) -> None:
        stamp = self._file_stamp()
        if stamp != self._stamp:
            try:
                self._blocked = dict(read_blocklist(self._path))
            # The stamp stays as it was, so that the next look tries again.
            except StoreError:
                return
            self._stamp = stamp

    def _file_stamp(self) -> tuple[int, int, int]:
        try:
            status = self._path.stat()
        except OSError:
            return 0, 0, 0
        return status.st_mtime_ns, status.st_size, status.st_ino


class RefusalCounter:
    """In which rounds each client was refused for good; not thread-safe."""

    def __init__(self) -> None:
        self._rounds: dict[str, list[int]] = {}

    def count(self, client: str, refusal: pb.Refusal, number: int, *, limit: int) -> str:
        """Count one refusal in a round, and return the reason to block the client; empty below the limit.

        After the limit the count begins anew, so that a client that the operator admits again has all its tries.
        """
        recent = [earlier for earlier in self._rounds.get(client, []) if number - earlier < COUNTED_ROUNDS]
        self._rounds[client] = [*recent, number]
        total = len(recent) + 1
        if total < limit:
            return ""
        del self._rounds[client]
        return f"{total} refusals within {COUNTED_ROUNDS} rounds, the last {reason_name(refusal.reason)}"
