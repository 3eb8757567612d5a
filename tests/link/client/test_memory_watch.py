from __future__ import annotations

import mmap
import os
import subprocess
import sys

from fedtune.link.client.memory_watch import memory_bytes, watch_memory

MIB = 2**20


def test_memory_is_what_a_process_has_written_to_and_no_mapped_file() -> None:
    before = memory_bytes(os.getpid())
    assert before is not None
    assert before > MIB
    with mmap.mmap(-1, 64 * MIB) as reserved:  # as torch does: addresses alone are no memory
        assert memory_bytes(os.getpid()) <= before + 32 * MIB  # type: ignore[operator]
        reserved.write(b"x" * 64 * MIB)
        assert memory_bytes(os.getpid()) >= before + 48 * MIB  # type: ignore[operator]


def test_a_process_that_stays_below_its_limit_is_left_alone() -> None:
    excess = list[str]()
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        watch_memory(process, 2**40, lambda: excess.append("too much"))
    assert (excess, process.returncode) == ([], 0)
    assert memory_bytes(process.pid) is None


def test_one_that_does_not_is_ended_after_it_was_said() -> None:
    excess = list[str]()
    with subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]) as process:
        watch_memory(process, 1024, lambda: excess.append("too much"))
    assert (excess, process.returncode) == (["too much"], -9)
