"""The engine of worker processes: forked from one nursery, which holds the base for all; the dead are replaced."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from fedtune.errors import ConfigError, Fault, RoundError
from fedtune.messages import Client, Failure
from fedtune.rounds.transport import Answer, Reply, Rule
from fedtune.simulation.fork_server import receive, write_payload
from fedtune.simulation.resources import Machine, Resources, next_start, start_order
from fedtune.wire.codec import EncodedAssignment

COMMAND = (sys.executable, "-P", "-m", "fedtune.client.worker_process")
"""What a nursery runs; -P because a file of the working directory must not stand in for a library's."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
"""While the nursery loads: threads do not outlive a fork. Each client's work sets its own number."""

LEAVE_S = 10.0
"""Seconds that a nursery is given to end its workers and itself."""


@dataclass(eq=False)
class Worker:
    """A process that does one client's work at a time."""

    pid: int
    place: int
    connection: Connection[bytes, bytes]
    parent: subprocess.Popen[bytes]
    held: set[str] = field(default_factory=set)
    """Digests of the bodies that it has."""


class ForkServer:
    """A fresh interpreter that loads the base once and forks workers; they share its memory until they write to it.

    Workers are not forked from the user's own process, whose threads, OpenMP pools and CUDA contexts do not survive
    that. The interpreter starts at once and imports its libraries while the caller loads what it needs itself; it is
    a context manager that leaves no process behind.
    """

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        """Start it.

        Args:
            command: runs `nursery.tend` on the descriptor that is its last argument.

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
        self._process, self._control = begin(command)

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.connection.close()
        self._workers.clear()
        self._leave()
        if self._payload is not None:
            os.close(self._payload)

    def load(self, spec: Mapping[str, Any], parts: Mapping[str, bytes]) -> None:
        """Hand over what the command's `prepare` is to load; returns at once, and is called once."""
        self._payload = write_payload(spec, parts)
        self._tell({"verb": "load"}, self._payload)

    def devices(self) -> tuple[str, ...]:
        """Return where workers compute, once everything is loaded.

        Raises:
            ConfigError: if the payload names what does not exist.
            RoundError: if it cannot be loaded for another reason.
        """
        if not self._devices:
            message = self._heard()
            if message is None:
                got = f'one that {self._ended()}; see what it printed, or set engine.name = "inprocess"'
                raise RoundError(f"expected a process that loads the base for the workers; got {got}")
            if "faults" in message:
                raise ConfigError([Fault(**fault) for fault in message["faults"]], source=message["source"])
            if "error" in message:
                raise RoundError(f"expected a process that loads the base for the workers; got {message['error']}")
            self._devices = tuple(message["devices"])
        return self._devices

    def fork(self, place: int, *, timeout_s: float | None = None) -> Worker:
        """Return a new worker; if the nursery has died, another is started and loaded first.

        Args:
            place: of the worker among the workers.
            timeout_s: seconds for which a worker in the middle of a message may leave this process waiting.

        Raises:
            RoundError: if there can be no worker.
        """
        self.devices()
        message, connection = self._born(place, timeout_s)
        if message is None:
            self._restart()
            message, connection = self._born(place, timeout_s)
        if message is None or "error" in message:
            connection.close()
            got = f"{message['error']}; lower engine.workers" if message else f"a nursery that {self._ended()}"
            raise RoundError(f"expected another worker process; got {got}")
        worker = Worker(message["pid"], place, connection, self._process)
        self._workers.add(worker)
        return worker

    def end(self, worker: Worker) -> str:
        """Kill a worker unless it is dead, and return how it ended, as a predicate."""
        worker.connection.close()
        message = None
        if worker in self._workers:  # else it has gone with an earlier nursery, and another must not touch its id
            self._workers.discard(worker)
            self._tell({"verb": "end", "pid": worker.pid})
            message = self._heard()
        return wait_for_exit(worker.parent) if message is None else exit_reason(message["status"])

    def _born(self, place: int, timeout_s: float | None) -> tuple[Any, Connection[bytes, bytes]]:
        """Return what the nursery says to one worker more, and the connection to that."""
        ours, theirs = socket.socketpair()
        if timeout_s is not None:
            limit = struct.pack("ll", int(timeout_s), int(timeout_s % 1 * 1e6))
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, limit)
        with ours, theirs:
            self._tell({"verb": "fork", "place": place}, theirs.fileno())
            theirs.close()
            message = self._heard()
            return message, Connection(ours.detach())

    def _restart(self) -> None:
        self._leave()
        self._workers.clear()
        self._devices = ()
        self._process, self._control = begin(self.command)
        assert self._payload is not None  # or nothing was ever loaded, and nothing forked
        self._tell({"verb": "load"}, self._payload)
        try:
            self.devices()
        except ConfigError as error:  # it was none at the start of the run
            raise RoundError(f"expected to start the nursery of the worker processes again; got {error}") from error

    def _leave(self) -> None:
        """Close the control socket, on which the nursery ends its workers and itself."""
        self._control.close()
        if not self._devices:
            self._process.kill()  # it has no worker to end, and does not listen while it loads
        wait_for_exit(self._process)

    def _tell(self, message: Mapping[str, Any], *descriptors: int) -> None:
        if self._control.fileno() != -1:
            with suppress(BrokenPipeError, ConnectionResetError):  # it is dead; so nothing will be heard
                socket.send_fds(self._control, [json.dumps(message).encode()], descriptors)

    def _heard(self) -> Any:
        """Return the nursery's answer, None if it is dead."""
        if self._control.fileno() == -1:
            return None
        try:
            return receive(self._control)[0]
        except ConnectionResetError:
            return None
        except BaseException:
            # On Ctrl-C: the answer that nobody waits for any more must not be taken for the next one.
            self._control.close()
            raise

    def _ended(self) -> str:
        return wait_for_exit(self._process)


def begin(command: Sequence[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start a nursery, which finds the modules that this process finds, and return it with its control socket."""
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


def wait_for_exit(process: subprocess.Popen[bytes]) -> str:
    """Wait for a process that is about to end, and return how it did, as a predicate."""
    try:
        return exit_reason(process.wait(LEAVE_S))
    except subprocess.TimeoutExpired:
        process.kill()
        return exit_reason(process.wait())


def exit_reason(status: int) -> str:
    """Return how a process ended, as a predicate: by an exit status, or by a signal if it is negative."""
    if status >= 0:
        return f"ended with status {status}"
    name = next((known.name for known in signal.Signals if known == -status), "without a name")
    memory = "; the system sends it when memory runs out" if status == -signal.SIGKILL else ""
    return f"was killed by signal {-status} ({name}{memory})"


@dataclass(frozen=True)
class RunningTask:
    client: str
    worker: Worker
    resources: Resources
    deadline: float
    """On the monotonic clock; infinite without a limit."""


class ProcessPool:
    """Runs clients' work in worker processes, as many at a time as the machine's cores and GPUs carry.

    A worker that dies or hangs costs one client its update of one round, and is replaced.
    """

    def __init__(
        self,
        nursery: ForkServer,
        fleet: Sequence[Client],
        resources: Mapping[str, Resources] | None = None,
        *,
        workers: int,
        cores: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Take over a nursery that has been told what to load; who made it closes it.

        Args:
            nursery: forks the workers.
            fleet: who takes part.
            resources: by client; one thread and an equal share of the GPU for the others.
            workers: processes at most; fewer for a smaller fleet.
            cores: CPU threads in use at the same time; none takes those that this process may run on.
            timeout_s: seconds for one client's work, after which its process is killed; none waits for ever.
        """
        self.fleet = fleet
        self.resources = {client.name: (resources or {}).get(client.name, Resources()) for client in fleet}
        self.timeout_s = timeout_s
        self._nursery = nursery
        self._places = frozenset(range(max(1, min(workers, len(fleet)))))
        self._cores = cores or len(os.sched_getaffinity(0))
        self._workers = dict[int, Worker]()
        self._running = dict[int, RunningTask]()

    def clients(self) -> Sequence[Client]:
        """Return the fleet, once the base is loaded."""
        self._nursery.devices()
        return self.fleet

    @property
    def at_work(self) -> Mapping[str, int]:
        """Process ids by client."""
        return {running.client: running.worker.pid for running in self._running.values()}

    def exchange(self, orders: Mapping[str, EncodedAssignment], rule: Rule) -> Generator[Answer, None, None]:
        """Yield one answer per client as they come in; there is no deadline on one machine but `timeout_s`.

        Raises:
            RoundError: if no worker can be had.
        """
        waiting = {name: orders[name] for name in start_order({name: self.resources[name] for name in orders})}
        needed = Counter(digest for order in orders.values() for digest in order.blobs)
        answers: Sequence[Answer] = ()
        try:
            while waiting or self._running or answers:
                try:
                    failures = self._start(waiting, needed)
                except RoundError:
                    yield from answers  # a round that is resumed need not ask for these again
                    raise
                # What came in is handed on only now, when every worker is busy again.
                yield from answers
                yield from failures
                answers = self._collected()
        finally:
            for running in self._running.values():
                self._lost(running.worker)
            self._running.clear()

    def _start(self, waiting: dict[str, EncodedAssignment], needed: Counter[str]) -> Sequence[Failure]:
        """Start whatever fits; return the failures of those whose worker was dead."""
        self._forget()
        places: Set[int] = self._places
        failures = list[Failure]()
        while waiting:
            machine = Machine(self._cores, len(self._places), self._nursery.devices())
            running = {place: running.resources for place, running in self._running.items()}
            found = next_start(waiting, self.resources, running, places - running.keys(), machine)
            if found is None:
                break
            client, place = found
            try:
                worker = self._workers.get(place) or self._nursery.fork(place, timeout_s=self.timeout_s)
            except RoundError:
                if not self._workers:
                    raise
                places = frozenset(self._workers)  # those that there are do it all
                continue
            self._workers[place] = worker
            order, resources = waiting.pop(client), self.resources[client]
            needed.subtract(order.blobs.keys())
            limit = float("inf") if self.timeout_s is None else time.monotonic() + self.timeout_s
            self._running[place] = RunningTask(client, worker, resources, limit)
            try:
                hand_out(worker, order, needed, threads=resources.threads)
            except OSError as error:
                failures.append(self._failed(self._running[place], hung=isinstance(error, BlockingIOError)))
        return failures

    def _forget(self) -> None:
        """Give up idle workers that have died; a client is to cost nothing for that."""
        idle: dict[object, Worker] = {
            worker.connection: worker for place, worker in self._workers.items() if place not in self._running
        }
        # An idle one has nothing to say but its end.
        for connection in wait([worker.connection for worker in idle.values()], 0):
            self._lost(idle[connection])

    def _collected(self) -> Sequence[Answer]:
        """Wait until something comes, a worker ends or a limit is reached, and return what that means."""
        if not self._running:
            return ()
        limit = min(running.deadline for running in self._running.values())
        connections = [worker.connection for worker in self._workers.values()]
        ready = wait(connections, None if limit == float("inf") else max(0.0, limit - time.monotonic()))
        now, answers = time.monotonic(), list[Answer]()
        for running in list(self._running.values()):
            if running.worker.connection in ready:
                answers.append(self._answer(running))
            elif now >= running.deadline:
                answers.append(self._failed(running, hung=True))
        return answers

    def _answer(self, running: RunningTask) -> Answer:
        connection = running.worker.connection
        try:
            word, content = connection.recv_bytes(), connection.recv_bytes()
        except BlockingIOError:  # its socket's limit
            return self._failed(running, hung=True)
        except (EOFError, OSError):
            return self._failed(running)
        if word == b"broken":
            return self._failed(running, error=content.decode())
        del self._running[running.worker.place]
        if word == b"failed":
            return Failure.from_text(running.client, content.decode())
        return Reply(running.client, content)

    def _failed(self, running: RunningTask, *, hung: bool = False, error: str = "") -> Failure:
        """Give up a worker and what it was at."""
        del self._running[running.worker.place]
        ended = self._lost(running.worker)
        if hung:
            got = f"none within {self.timeout_s:g} s; its process was killed; raise engine.timeout_s, or ask less of it"
        elif error:
            got = f"{error}; its process was replaced; FEDTUNE_DEBUG=1 shows where that was raised"
        else:
            got = f"none: its process {ended}; lower client.batch or engine.workers if memory ran out"
        # What a killed process died of is not known; planners ask for less, as after an error of its memory.
        code = "" if hung or error else "OUT_OF_MEMORY"
        return Failure(running.client, expected="an update", got=got, where=running.client, code=code)

    def _lost(self, worker: Worker) -> str:
        del self._workers[worker.place]
        return self._nursery.end(worker)


def hand_out(worker: Worker, order: EncodedAssignment, needed: Counter[str], *, threads: int) -> None:
    """Send an order to an idle worker: bodies that it holds stay there, those that nobody needs any more are dropped.

    Raises:
        OSError: if the worker is dead, or does not read.
    """
    drop = {digest for digest in worker.held if not needed[digest]} - order.blobs.keys()
    new = [digest for digest in order.blobs if digest not in worker.held]
    worker.held = (worker.held - drop) | set(new)
    head = {"threads": threads, "drop": sorted(drop), "bodies": new}
    worker.connection.send_bytes(json.dumps(head).encode())
    worker.connection.send_bytes(order.header)
    for digest in new:
        worker.connection.send_bytes(order.blobs[digest])
