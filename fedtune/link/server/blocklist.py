"""Clients that a server takes nothing from for now: a file of names and reasons that the operator may edit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from fedtune.errors import StoreError
from fedtune.store.files import store_errors, write_text

HEAD = "# One client per line, then why. Remove its line to admit a client again; a running server looks each second.\n"


def read_blocklist(path: Path) -> Mapping[str, str]:
    """Return why each client is barred.

    Raises:
        StoreError: if the file cannot be read.
    """
    if not path.exists():
        return {}
    with store_errors(path):
        text = path.read_text(encoding="utf-8", errors="replace")
    lines = [one.split(maxsplit=1) for one in text.splitlines() if one.strip() and not one.startswith("#")]
    return {words[0]: " ".join(words[1:]) or "by the operator" for words in lines}


def write_blocklist(path: Path, bars: Mapping[str, str]) -> None:
    """Write the file whole."""
    write_text(path, HEAD + "".join(f"{name} {' '.join(why.split())}\n" for name, why in sorted(bars.items())))


class Blocklist:
    """The file, read again when it has changed."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock, self._lock = path, clock, threading.Lock()
        self._read_at, self._stamp, self._bars = float("-inf"), (0, 0, 0), dict[str, str]()

    def why(self, client: str) -> str:
        """Return why a client is barred; empty if it is not. A file that cannot be read changes nothing."""
        with self._lock:
            if self._clock() - self._read_at >= 1.0:
                self._read_at = self._clock()
                self._reload()
            return self._bars.get(client, "")

    def bar(self, client: str, why: str) -> None:
        """Bar a client, durably.

        Raises:
            StoreError: if the file cannot be written; the client is barred as long as this process lives.
        """
        with self._lock:
            self._reload()
            self._bars[client] = why
            write_blocklist(self._path, self._bars)
            self._stamp = self._found()

    def _reload(self) -> None:
        stamp = self._found()
        if stamp != self._stamp:
            try:
                self._bars = dict(read_blocklist(self._path))
            except StoreError:
                return
            self._stamp = stamp

    def _found(self) -> tuple[int, int, int]:
        try:
            found = self._path.stat()
        except OSError:
            return 0, 0, 0
        return found.st_mtime_ns, found.st_size, found.st_ino
