"""The main memory of this machine, and of this process, as the system states them."""

from __future__ import annotations

import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Files with a container's limit and what it takes, by version of the interface."""


def available_bytes() -> int:
    """Return the memory that a process could still take here: the system's estimate, within a container's limit."""
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if (stated := field_of("/proc/meminfo", "MemAvailable")) is not None:
        free = stated
    for limit, used in CGROUPS:
        with suppress(OSError, ValueError):  # "max" where there is none
            # Files that were read count as used, and give way.
            taken = int(Path(used).read_text()) - (cached_bytes(Path(used).parent) or 0)
            free = min(free, max(0, int(Path(limit).read_text()) - taken))
    return free


def cached_bytes(folder: Path) -> int | None:
    """Return the bytes of files that a container's memory holds; None where it does not say."""
    with suppress(OSError):
        for line in (folder / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name in ("inactive_file", "total_inactive_file"):
                return int(value)
    return None


def field_of(file: str, name: str) -> int | None:
    """Return the bytes that a line such as `MemAvailable: 12 kB` of a file of the system states; None without it."""
    with suppress(OSError):
        for line in Path(file).read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def resident_bytes() -> int:
    """Return the memory that this process takes now; its most so far where the system does not state that."""
    return field_of("/proc/self/status", "VmRSS") or peak_bytes()


def peak_bytes() -> int:
    """Return the most memory that this process has taken, since `forget_peak` where that is possible."""
    if (stated := field_of("/proc/self/status", "VmHWM")) is not None:
        return stated
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def forget_peak() -> bool:
    """Let the peak of this process begin anew; return whether the system can."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
