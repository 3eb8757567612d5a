"""The user's side of the process that forks workers: it is started, given what to load, and asked for workers."""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, NoReturn

from threadpoolctl import threadpool_info, threadpool_limits

from fedtune.errors import ConfigError, Fault, RoundError
from fedtune.simulation.fork_server import receive, threads, write_payload

COMMAND = (sys.executable, "-P", "-m", "fedtune.client.worker_process")
"""Starts a fork server; -P because a file of the working directory must not be imported in place of a library."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""While the fork server loads: threads do not outlive a fork. Each client's work sets its own number."""

LEAVE_S = 10.0
"""Seconds that a fork server has to end its workers and itself."""


@dataclass(eq=False)
class Worker:
    """A process that does one client's work at a time."""

    pid: int
    place: int
    connection: Connection[bytes, bytes]
    parent: subprocess.Popen[bytes] | ForkedProcess
    digests: set[str] = field(default_factory=set)
    """Of the bodies that it has."""


class ForkServer:
    """A process that loads the base once and forks workers; they share its memory until they write to it.

    Workers are not forked from the user's own process, whose threads, OpenMP pools and CUDA contexts do not survive
    that. A fresh interpreter starts at once and imports its libraries while the caller loads what it needs itself;
    where the caller has imported them and done nothing else with them yet, it is forked instead: they are loaded once,
    and in memory once. It is a context manager that leaves no process behind.
    """

    def __init__(self, command: Sequence[str] = COMMAND, begin: Callable[[int], None] | None = None) -> None:
        """Start it.

        Args:
            command: runs `fork_server.serve` on the descriptor that is its last argument.
            begin: does the same in a fork of this process, whose libraries have computed nothing yet. Where this
                process has other threads, and for every later start, the command is run.

        Raises:
            ConfigError: on another system than Linux.
        """
        if sys.platform != "linux":
            hint = 'set engine.name = "inprocess"'
            raise ConfigError(Fault("", "Linux for worker processes that share memory", repr(sys.platform), hint))
        self.command = command
        self._payload: int | None = None
        self._devices: tuple[str, ...] = ()
        self._workers = set[Worker]()
        self._process: subprocess.Popen[bytes] | ForkedProcess
        forks = begin is not None and threads_survive_a_fork()
        self._process, self._control = fork_server(begin) if begin and forks else start_server(command)

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.connection.close()
        self._workers.clear()
        self._stop()
        if self._payload is not None:
            os.close(self._payload)

    def load(self, spec: Mapping[str, Any], parts: Mapping[str, bytes]) -> None:
        """Send what the command's `prepare` is to load; returns at once, and is called once."""
        self._payload = write_payload(spec, parts)
        self._send({"verb": "load"}, self._payload)

    def devices(self) -> tuple[str, ...]:
        """Return where workers compute, once everything is loaded.

        Raises:
            ConfigError: if the payload names what does not exist.
            RoundError: if it cannot be loaded for another reason.
        """
        if not self._devices:
            message = self._receive()
            if message is None:
                got = f'one that {wait_for_exit(self._process)}; see what it printed, or set engine.name = "inprocess"'
                raise RoundError(f"expected a process that loads the base for the workers; got {got}")
            if "faults" in message:
                raise ConfigError([Fault(**fault) for fault in message["faults"]], source=message["source"])
            if "error" in message:
                raise RoundError(f"expected a process that loads the base for the workers; got {message['error']}")
            self._devices = tuple(message["devices"])
        return self._devices

    def fork(self, place: int, *, timeout_s: float | None = None) -> Worker:
        """Return a new worker; if the fork server has died, another is started and loaded first.

        Args:
            place: of the worker among the workers.
            timeout_s: seconds that this process waits for a worker in the middle of a message.

        Raises:
            RoundError: if there are no processes left, or the fork server ends again.
        """
        self.devices()
        message, connection = self._request_worker(place, timeout_s)
        if message is None:
            self._restart()
            message, connection = self._request_worker(place, timeout_s)
        if message is None or "error" in message:
            connection.close()
            got = (
                f"{message['error']}; lower engine.workers"
                if message
                else f"a fork server that {wait_for_exit(self._process)}"
            )
            raise RoundError(f"expected another worker process; got {got}")
        worker = Worker(message["pid"], place, connection, self._process)
        self._workers.add(worker)
        return worker

    def end(self, worker: Worker) -> str:
        """Kill a worker unless it is dead, and return how it ended, as a predicate."""
        message = None
        with worker.connection:  # closed last: a worker ends by itself once it is, and would not be killed
            if worker in self._workers:  # else it ended with an earlier server; its id may be another process's
                self._workers.discard(worker)
                self._send({"verb": "end", "pid": worker.pid})
                message = self._receive()
        return wait_for_exit(worker.parent) if message is None else exit_reason(message["status"])

    def _request_worker(self, place: int, timeout_s: float | None) -> tuple[Any, Connection[bytes, bytes]]:
        """Return the answer to a request for a worker, None if the server is dead, and the connection to the worker."""
        ours, theirs = socket.socketpair()
        if timeout_s is not None:
            limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, limit)
        with ours, theirs:
            self._send({"verb": "fork", "place": place}, theirs.fileno())
            theirs.close()
            message = self._receive()
            return message, Connection(ours.detach())

    def _restart(self) -> None:
        self._stop()
        self._workers.clear()
        self._devices = ()
        self._process, self._control = start_server(self.command)
        assert self._payload is not None  # or nothing was loaded, and nothing forked
        self._send({"verb": "load"}, self._payload)
        try:
            self.devices()
        except ConfigError as error:  # the payload had no fault at the start of the run
            raise RoundError(f"expected to restart the fork server of the worker processes; got {error}") from error

    def _stop(self) -> None:
        """Close the control socket, on which the fork server ends its workers and itself."""
        self._control.close()
        if not self._devices:
            self._process.kill()  # it has no worker to end, and does not listen while it loads
        wait_for_exit(self._process)

    def _send(self, message: Mapping[str, Any], *descriptors: int) -> None:
        if self._control.fileno() != -1:
            with suppress(BrokenPipeError, ConnectionResetError):  # it is dead; the next `_receive` returns None
                socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)

    def _receive(self) -> Any:
        """Return the fork server's answer, None if it is dead."""
        if self._control.fileno() == -1:
            return None
        try:
            return receive(self._control)[0]
        except ConnectionResetError:
            return None
        except BaseException:
            # On Ctrl-C: the answer that is still to come must not be taken for that to the next message.
            self._control.close()
            raise


@dataclass(eq=False)
class ForkedProcess:
    """A fork of this process, waited for as `subprocess.Popen` waits."""

    pid: int
    status: int | None = None
    """How it has ended, as `Popen.returncode`."""

    def wait(self, timeout: float | None = None) -> int:
        """Return how it ended.

        Raises:
            TimeoutExpired: if it has not within so many seconds.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while self.status is None:
            ended, status = os.waitpid(self.pid, 0 if deadline is None else os.WNOHANG)
            if ended:
                self.status = os.waitstatus_to_exitcode(status)
            elif deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("fork", timeout or 0.0)
            else:
                time.sleep(0.005)
        return self.status

    def kill(self) -> None:
        if self.status is None:  # else its id may be another process's
            os.kill(self.pid, signal.SIGKILL)


def threads_survive_a_fork() -> bool:
    """Return whether this process has no thread but its own and those of libraries that see to themselves in a fork.

    OpenBLAS ends its threads before a fork and starts them when it needs them; jemalloc, of pyarrow, does likewise.
    """
    pools = [pool["num_threads"] - 1 for pool in threadpool_info() if pool["internal_api"] == "openblas"]
    others = [name for name in threads(0) if name != "jemalloc_bg_thd"]
    return threading.active_count() == 1 and len(others) <= 1 + sum(pools)


def fork_server(begin: Callable[[int], None]) -> tuple[ForkedProcess, socket.socket]:
    """Fork a fork server from this process, and return it with its control socket."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # else both processes would write what waits in it
    gc.collect()
    gc.freeze()  # else the first collection of either would copy every page that holds an object
    # OpenBLAS ends its threads before a fork; it starts them again for more than one, or where a number is set.
    with threadpool_limits(1):
        pid = os.fork()
        if pid == 0:
            be_forked(begin, theirs.detach())
    gc.unfreeze()
    theirs.close()
    return ForkedProcess(pid), control


def be_forked(begin: Callable[[int], None], descriptor: int) -> NoReturn:
    """Be the fork server, on its end of the control socket; the process ends with that."""
    try:
        # All others: by the end of the control socket the fork server learns that this process is gone.
        os.closerange(3, descriptor)
        os.closerange(descriptor + 1, os.sysconf("SC_OPEN_MAX"))
        os.setsid()  # as in `start_server`
        os.environ.update(ONE_THREAD)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        begin(descriptor)
    finally:
        os._exit(1)  # `serve` has ended the process


def start_server(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a fork server with this process's module path, and return it with its control socket."""
    control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    with theirs:
        process = subprocess.Popen(
            [*command, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C goes to a terminal's whole group; this process decides what it means
        )
    return process, control


def wait_for_exit(process: subprocess.Popen[bytes] | ForkedProcess) -> str:
    """Wait for a process that is about to end, and return how it ended, as a predicate."""
    try:
        return exit_reason(process.wait(LEAVE_S))
    except subprocess.TimeoutExpired:
        process.kill()
        return exit_reason(process.wait())


def exit_reason(status: int) -> str:
    """Return how a process ended, as a predicate: by an exit status, or by a signal if it is negative."""
    if status >= 0:
        return f"ended with status {status}"
    name = next((number.name for number in signal.Signals if number == -status), "without a name")
    memory = "; the system sends it when memory runs out" if status == -signal.SIGKILL else ""
    return f"was killed by signal {-status} ({name}{memory})"
