"""The engine of worker processes: several clients at once over one copy of the base; a worker that dies is replaced."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Generator, Mapping, Sequence, Set
from dataclasses import dataclass
from multiprocessing.connection import wait

from fedtune.errors import RoundError
from fedtune.messages import Client, Failure
from fedtune.rounds.transport import Answer, Reply, Rule
from fedtune.simulation.fork_client import ForkServer, Worker
from fedtune.simulation.resources import Machine, Resources, next_start, start_order
from fedtune.wire.codec import EncodedAssignment


@dataclass(frozen=True)
class RunningTask:
    """A client's work that a worker does."""

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
        fork_server: ForkServer,
        fleet: Sequence[Client],
        resources: Mapping[str, Resources] | None = None,
        *,
        workers: int,
        cores: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        """Use a fork server that has been sent its payload; the caller closes it.

        Args:
            fork_server: forks the workers.
            fleet: the clients.
            resources: by client; one thread and an equal share of the GPU for clients that are not named.
            workers: processes at most; fewer for a smaller fleet.
            cores: CPU threads in use at the same time; none takes those that this process may run on.
            timeout_s: seconds for one client's work, after which its process is killed; none waits without end.
        """
        self.fleet = fleet
        self.resources = {client.name: (resources or {}).get(client.name, Resources()) for client in fleet}
        self.timeout_s = timeout_s
        self._fork_server = fork_server
        self._places = frozenset(range(max(1, min(workers, len(fleet)))))
        self._cores = cores or len(os.sched_getaffinity(0))
        self._workers = dict[int, Worker]()
        self._running = dict[int, RunningTask]()

    def clients(self) -> Sequence[Client]:
        """Return the fleet, once the base is loaded."""
        self._fork_server.devices()
        return self.fleet

    def exchange(self, assignments: Mapping[str, EncodedAssignment], rule: Rule) -> Generator[Answer, None, None]:
        """Yield one answer per client as they come in; there is no deadline on one machine but `timeout_s`.

        Raises:
            RoundError: if there can be no worker.
        """
        waiting = {
            name: assignments[name] for name in start_order({name: self.resources[name] for name in assignments})
        }
        needed = Counter(digest for assignment in assignments.values() for digest in assignment.blobs)
        answers: Sequence[Answer] = ()
        try:
            while waiting or self._running or answers:
                try:
                    failures = self._start(waiting, needed)
                except RoundError:
                    yield from answers  # a resumed round need not repeat this work
                    raise
                # Only now, when every worker is busy again: the caller may take long over an answer.
                yield from answers
                yield from failures
                answers = self._collect()
        finally:
            for running in self._running.values():
                self._end_worker(running.worker)
            self._running.clear()

    def _start(self, waiting: dict[str, EncodedAssignment], needed: Counter[str]) -> Sequence[Failure]:
        """Start the clients that fit beside those that run; return the failures of those whose worker was dead."""
        self._drop_dead_workers()
        places: Set[int] = self._places
        failures = list[Failure]()
        while waiting:
            machine = Machine(self._cores, len(self._places), self._fork_server.devices())
            running = {place: running.resources for place, running in self._running.items()}
            start = next_start(waiting, self.resources, running, places - running.keys(), machine)
            if start is None:
                break
            client, place = start
            try:
                worker = self._workers.get(place) or self._fork_server.fork(place, timeout_s=self.timeout_s)
            except RoundError:
                if not self._workers:
                    raise
                places = frozenset(self._workers)  # the workers there are do all the work
                continue
            self._workers[place] = worker
            assignment, resources = waiting.pop(client), self.resources[client]
            needed.subtract(assignment.blobs.keys())
            limit = float("inf") if self.timeout_s is None else time.monotonic() + self.timeout_s
            self._running[place] = RunningTask(client, worker, resources, limit)
            try:
                send_assignment(worker, assignment, needed, client=client, threads=resources.threads)
            except OSError as error:
                failures.append(self._give_up(self._running[place], hung=isinstance(error, BlockingIOError)))
        return failures

    def _drop_dead_workers(self) -> None:
        """End idle workers that have died, so that no client loses its work to one."""
        idle: dict[object, Worker] = {
            worker.connection: worker for place, worker in self._workers.items() if place not in self._running
        }
        # An idle worker sends nothing; its connection becomes readable when it ends.
        for connection in wait([worker.connection for worker in idle.values()], 0):
            self._end_worker(idle[connection])

    def _collect(self) -> Sequence[Answer]:
        """Wait until a worker answers, ends or reaches its limit, and return the answers and failures."""
        if not self._running:
            return ()
        limit = min(running.deadline for running in self._running.values())
        connections = [worker.connection for worker in self._workers.values()]
        ready = wait(connections, None if limit == float("inf") else max(0.0, limit - time.monotonic()))
        now, answers = time.monotonic(), list[Answer]()
        for running in list(self._running.values()):
            if running.worker.connection in ready:
                answers.append(self._read_answer(running))
            elif now >= running.deadline:
                answers.append(self._give_up(running, hung=True))
        return answers

    def _read_answer(self, running: RunningTask) -> Answer:
        connection = running.worker.connection
        try:
            word, content = connection.recv_bytes(), connection.recv_bytes()
        except BlockingIOError:  # its socket's limit
            return self._give_up(running, hung=True)
        except (EOFError, OSError):
            return self._give_up(running)
        del self._running[running.worker.place]
        if word == b"broken":
            self._end_worker(running.worker)
        if word in (b"failed", b"broken"):
            return Failure.from_text(running.client, content.decode())
        return Reply(running.client, content)

    def _give_up(self, running: RunningTask, *, hung: bool = False) -> Failure:
        """End a worker that does not answer, and return the failure of its client."""
        del self._running[running.worker.place]
        ended = self._end_worker(running.worker)
        if hung:
            got = f"none within {self.timeout_s:g} s; its process was killed; raise engine.timeout_s, or ask less of it"
        else:
            got = f"none: its process {ended}; lower client.batch or engine.workers if memory ran out"
        # Why a killed process ended is not known; planners ask for less, as after an error of its memory.
        code = "" if hung else "OUT_OF_MEMORY"
        return Failure(running.client, expected="an update", got=got, where=running.client, code=code)

    def _end_worker(self, worker: Worker) -> str:
        del self._workers[worker.place]
        return self._fork_server.end(worker)


def send_assignment(
    worker: Worker, assignment: EncodedAssignment, needed: Counter[str], *, client: str, threads: int
) -> None:
    """Send an assignment to an idle worker, without the bodies it has, and let it drop those not needed again.

    Raises:
        OSError: if the worker is dead, or does not read.
    """
    drop = {digest for digest in worker.digests if not needed[digest]} - assignment.blobs.keys()
    new = [digest for digest in assignment.blobs if digest not in worker.digests]
    worker.digests = (worker.digests - drop) | set(new)
    head = {"client": client, "threads": threads, "drop": sorted(drop), "bodies": new}
    worker.connection.send_bytes(json.dumps(head).encode())
    worker.connection.send_bytes(assignment.header)
    for digest in new:
        worker.connection.send_bytes(assignment.blobs[digest])
