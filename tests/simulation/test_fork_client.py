"""A fork server that is asked from outside: what it cannot load is said, and how it ended is put into words."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedtune.errors import ConfigError, RoundError
from fedtune.simulation.fork_client import ForkedProcess, ForkServer, exit_reason

COMMAND = (sys.executable, str(Path(__file__).with_name("scripted.py")))


def loaded(fork_server: ForkServer, **spec: Any) -> ForkServer:
    fork_server.load(spec, {"data": b"shared"})
    return fork_server


@pytest.mark.parametrize(
    ("start", "error", "text"),
    [
        ("fault", ConfigError, "a.toml: 1 fault\n  model.base: expected a base; got none; give one"),
        (
            "die",
            RoundError,
            "expected a process that loads the base for the workers; got one that was killed by signal 9",
        ),
        ("break", RoundError, "expected a process that loads the base for the workers; got MemoryError: no room"),
        ("threads", RoundError, "expected one thread in the process that forks the workers; got 2"),
    ],
)
def test_what_cannot_be_loaded_is_told_and_waited_for_by_nobody(start: str, error: type[Exception], text: str) -> None:
    with loaded(ForkServer(COMMAND), start=start) as fork_server:
        with pytest.raises(error) as caught:
            fork_server.devices()
        assert text in str(caught.value)


def test_a_command_that_is_none_is_told() -> None:
    command = [sys.executable, "-c", "raise SystemExit(7)"]
    with loaded(ForkServer(command)) as fork_server, pytest.raises(RoundError, match="one that ended with status 7"):
        fork_server.devices()


def test_an_end_is_put_into_words() -> None:
    assert exit_reason(1) == "ended with status 1"
    assert exit_reason(-signal.SIGSEGV) == "was killed by signal 11 (SIGSEGV)"
    assert "memory" in exit_reason(-signal.SIGKILL)
    assert exit_reason(-60) == "was killed by signal 60 (without a name)"


def test_another_system_is_told_to_use_the_engine_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match="expected Linux for worker processes that share memory; got 'darwin'"):
        ForkServer(COMMAND)


def test_a_loaded_server_says_where_its_workers_compute_and_forks_them() -> None:
    with loaded(ForkServer(COMMAND), devices=["cuda:0", "cuda:1"]) as fork_server:
        assert fork_server.devices() == ("cuda:0", "cuda:1")
        workers = [fork_server.fork(place) for place in (0, 1)]
        assert len({worker.pid for worker in workers}) == 2
        assert fork_server.end(workers[0]).startswith("was killed by signal 9 (SIGKILL")


def child(code: str, **options: Any) -> str:
    """Run code in a process of its own, which has no thread but those of its libraries, and return what it prints."""
    before = f"""
import os, signal, sys, threading
from functools import partial
sys.path.insert(0, {str(Path(__file__).parent)!r})
from scripted import prepare
from fedtune.simulation.fork_client import ForkedProcess, ForkServer
from fedtune.simulation.fork_server import serve
COMMAND = ({sys.executable!r}, {COMMAND[1]!r})
begin = lambda descriptor: serve(descriptor, prepare)
"""
    # As a program starts it: a test process may have any threads, and any libraries that have computed.
    done: subprocess.CompletedProcess[str]
    done = subprocess.run([sys.executable, "-c", before + code], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_process_that_has_computed_nothing_is_forked_and_what_it_forks_is_replaced_by_the_command() -> None:
    printed = child("""
print("before", end="")
own = open("/dev/zero")
with ForkServer(COMMAND, begin) as server:
    first = server._process
    assert isinstance(first, ForkedProcess)
    server.load({}, {"data": b"shared"})
    worker = server.fork(0)
    assert worker.parent is first
    assert os.getsid(first.pid) == first.pid != os.getsid(0)
    files = {name: os.readlink(f"/proc/{first.pid}/fd/{name}") for name in os.listdir(f"/proc/{first.pid}/fd")}
    assert files["0"] == files["1"] == os.devnull
    assert "/dev/zero" not in files.values()
    os.kill(first.pid, signal.SIGKILL)
    assert server.end(worker).startswith("was killed by signal 9")
    again = server.fork(0)
    assert not isinstance(again.parent, ForkedProcess)
    assert first.wait(0.0) == -9
with ForkServer(COMMAND, begin) as server:
    server.load({"start": "fault"}, {"data": b"shared"})
    try:
        server.devices()
    except Exception as error:
        print(";", error)
assert server._process.wait(5.0) in (0, -9)  # it may have been on its way out
""")
    assert printed == "before; a.toml: 1 fault\n  model.base: expected a base; got none; give one\n"


def test_a_fork_starts_no_threads_of_blas_whatever_their_number_is() -> None:
    printed = child(
        """
import numpy as np
np.ones((500, 500)) @ np.ones((500, 500))
def begin(descriptor):
    np.ones((500, 500)) @ np.ones((500, 500))  # in the fork, as a base is loaded
    serve(descriptor, prepare)
before = len(os.listdir("/proc/self/task"))
with ForkServer(COMMAND, begin) as server:
    assert isinstance(server._process, ForkedProcess)
    server.load({}, {"data": b"shared"})
    print(before > 1, server.devices(), len(os.listdir(f"/proc/{server._process.pid}/task")))
np.ones((500, 500)) @ np.ones((500, 500))
assert len(os.listdir("/proc/self/task")) == before  # this process has its threads back
""",
        env={**os.environ, "OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"},
    )
    assert printed == "True ('cpu',) 1\n"


def test_a_process_with_threads_is_not_forked() -> None:
    child("""
leave = threading.Event()
threading.Thread(target=leave.wait).start()
with ForkServer(COMMAND, begin) as server:
    assert not isinstance(server._process, ForkedProcess)
leave.set()
""")


def test_a_forked_server_ends_with_the_process_that_it_was_forked_from() -> None:
    printed = child("""
server = ForkServer(COMMAND, begin)
server.load({}, {"data": b"shared"})
worker = server.fork(0)
print(server._process.pid, worker.pid, flush=True)
os._exit(0)
""")
    for pid in map(int, printed.split()):
        for _ in range(500):
            if not Path(f"/proc/{pid}").exists() or ") Z " in Path(f"/proc/{pid}/stat").read_text():
                break
            select.select([], [], [], 0.01)
        else:
            raise AssertionError(f"process {pid} is still there")


def test_a_forked_process_is_waited_for_as_another_is() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(7)
    process = ForkedProcess(pid)
    assert process.wait() == process.wait(1.0) == 7
    process.kill()  # changes nothing
    pid = os.fork()
    if pid == 0:
        signal.pause()
    process = ForkedProcess(pid)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.0)
    process.kill()
    assert process.wait(10.0) == -signal.SIGKILL
