"""The main memory of a process, looked at from outside, and its end when it takes more than it may."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from fedtune.link.settings import KIB

POLL_S = 0.1
"""Between two looks: a process writes to less than a gibibyte of new memory in it."""
OWN = ("RssAnon:", "RssShmem:")
"""Memory that the system cannot take back; pages of mapped files, which it can, are left out."""


def memory_bytes(pid: int) -> int | None:
    """Return how much memory a process takes for itself; None once it has ended.

    A limit on its address space would not do: torch maps many times what it uses.
    """
    status = Path(f"/proc/{pid}/status")
    if status.exists():
        with suppress(OSError):
            lines = [line.split() for line in status.read_text().splitlines()]
            sizes = [int(words[1]) for words in lines if words and words[0] in OWN]
            return KIB * sum(sizes) if sizes else None  # a process that has ended has none of these lines
        return None
    if Path("/proc/self/status").exists():
        return None
    # As on macOS; mapped files are counted there.
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return KIB * int(done.stdout) if done.stdout.strip().isdecimal() else None


def watch_memory(process: subprocess.Popen[bytes], limit: int, on_excess: Callable[[], None]) -> None:
    """Look at a process until it ends; if it takes more than `limit` bytes, call `on_excess` and end it."""
    while (taken := memory_bytes(process.pid)) is not None:
        if taken > limit:
            # Before the end, after which the caller asks why it came.
            on_excess()
            with suppress(ProcessLookupError):
                process.kill()
            return
        with suppress(subprocess.TimeoutExpired):
            process.wait(POLL_S)
            return
