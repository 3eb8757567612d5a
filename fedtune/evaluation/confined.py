"""The process that runs one generated program: no network, a file system it cannot write to, and limits on everything.

Started as a file of its own (`python -I confined.py`) with the program on standard input; imports nothing of fedtune.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys

NEW_USER, NEW_NET, NEW_MOUNTS, NEW_PIDS, NEW_IPC = 0x10000000, 0x40000000, 0x00020000, 0x20000000, 0x08000000
PRIVATE, RECURSIVE, NO_NEW_PRIVS, MOUNT_SETATTR, CAPSET_VERSION = 1 << 18, 0x8000, 38, 442, 0x20080522
READ_ONLY = 1
NOT_CONFINED, OUT_OF_TIME, OUT_OF_MEMORY = 77, 78, 79
"""Exit statuses: the kernel gives no namespaces and nothing was run; what the kernel has ended a program for."""


def confine() -> None:
    """Enter namespaces without a network, where every file can be read and none written; give up all capabilities.

    Raises:
        OSError: if the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def call(result: int) -> None:
        if result != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    call(libc.unshare(NEW_USER | NEW_NET | NEW_MOUNTS | NEW_PIDS | NEW_IPC))
    call(libc.mount(None, b"/", None, PRIVATE | 0x4000, None))
    # struct mount_attr: attributes to set, to clear, propagation, and the file descriptor of a user namespace.
    attributes = (ctypes.c_uint64 * 4)(READ_ONLY, 0, 0, 0)
    call(libc.syscall(MOUNT_SETATTR, -100, b"/", RECURSIVE, ctypes.byref(attributes), ctypes.sizeof(attributes)))
    # Without this a program could make the mounts writable again.
    header, none = (ctypes.c_uint32 * 2)(CAPSET_VERSION, 0), (ctypes.c_uint32 * 6)()
    call(libc.capset(ctypes.byref(header), ctypes.byref(none)))
    call(libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))


def limit(memory_bytes: int, seconds: int) -> None:
    """Bound memory, processor time, what is written, and the number of files and processes."""
    bounds = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 32,
        resource.RLIMIT_NPROC: 16,
        resource.RLIMIT_CORE: 0,
    }
    for name, bound in bounds.items():
        resource.setrlimit(name, (bound, bound))


def run(program: str) -> str:
    """Run a program to its end, and return `passed`, `failed` or `memory`."""
    try:
        # A main module of its own: what it defines must find it there.
        exec(compile(program, "program", "exec"), {"__name__": "__main__"})  # what this process is for
    except MemoryError:
        return "memory"
    except BaseException:  # whatever it raises, and sys.exit
        return "failed"
    return "passed"


def judge(code: int, seconds: int) -> int:
    """Return the exit status of a program that has ended: the kernel kills alike for time and for memory."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code and used.ru_utime + used.ru_stime > seconds - 0.1:
        return OUT_OF_TIME
    return OUT_OF_MEMORY if code == -signal.SIGKILL else code & 0xFF


def main() -> int:
    """Read what is to be run, and write the answer's mark and outcome where the caller reads them."""
    given = json.loads(sys.stdin.buffer.read())
    answer = os.dup(1)
    if given["confined"]:
        try:
            confine()
        except (OSError, AttributeError):  # AttributeError: a C library without these calls
            return NOT_CONFINED
    # The first process of the namespace: all that it leaves behind ends with it.
    if child := os.fork():
        _, status = os.waitpid(child, 0)
        return judge(os.waitstatus_to_exitcode(status), given["seconds"])
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    limit(given["memory_bytes"], given["seconds"])
    outcome = run(given["program"])
    with contextlib.suppress(OSError):
        os.write(answer, f"{given['mark']} {outcome}".encode())
    os._exit(0)  # threads and exit handlers of the program get no say


if __name__ == "__main__":
    sys.exit(main())
